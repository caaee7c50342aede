#!/bin/sh
# slim.sh SITE_PACKAGES [no-bytecode]: remove files that no program in the image reads at run time. Without bytecode an
# image is smaller, but its programs start more slowly.
set -eu
cd "$1"
find . -type d -name tests -prune -exec rm -rf {} +
find . -type f \( -name '*.pyi' -o -name '*.pxd' -o -name '*.a' \) -delete
rm -rf torch/include torch/test torch/share torch/bin/test_* torch/bin/protoc* onnx/backend/test/data
# OpenVINO runs on the CPU here. Its plug-ins for GPU and NPU need drivers that the image does not have.
rm -rf openvino/include openvino/libs/libopenvino_intel_[gn]pu_plugin.so openvino/libs/cache.json
# OpenVINO reads only ONNX and its own IR here.
for frontend in gguf jax paddle pytorch tensorflow tensorflow_lite; do
    rm -f openvino/libs/libopenvino_"$frontend"_frontend.so*
done
# OpenVINO and NNCF report their use through this package, and work without it.
rm -rf openvino_telemetry
rm -rf sklearn/datasets/data sklearn/datasets/images sklearn/datasets/descr
if [ "${2:-}" != no-bytecode ]; then
    # Compile here, not in pip: pip would use one core and also compile the files removed above. Some templates are not
    # valid Python: ignore their errors.
    /opt/venv/bin/python -m compileall -q -j 0 . >/dev/null || true
fi
