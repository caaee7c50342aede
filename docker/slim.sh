#!/bin/sh
# slim.sh SITE_PACKAGES [no-bytecode]: remove what no program here reads at run time. Without bytecode an image is smaller
# and its programs start later.
set -eu
cd "$1"
find . -type d -name tests -prune -exec rm -rf {} +
find . -type f \( -name '*.pyi' -o -name '*.pxd' -o -name '*.a' \) -delete
rm -rf torch/include torch/test torch/share torch/bin/test_* torch/bin/protoc* onnx/backend/test/data
# OpenVINO runs on the CPU here; its plug-ins for GPU and NPU would look for drivers that an image does not have.
rm -rf openvino/include openvino/libs/libopenvino_intel_[gn]pu_plugin.so openvino/libs/cache.json
# It reads ONNX and its own IR only.
for frontend in gguf jax paddle pytorch tensorflow tensorflow_lite; do
    rm -f openvino/libs/libopenvino_"$frontend"_frontend.so*
done
rm -rf sklearn/datasets/data sklearn/datasets/images sklearn/datasets/descr
if [ "${2:-}" != no-bytecode ]; then
    # pip compiles nothing here: it would also compile what is removed above, and on one core. Templates that are no
    # Python do not compile, which is no error.
    /opt/venv/bin/python -m compileall -q -j 0 . >/dev/null || true
fi
