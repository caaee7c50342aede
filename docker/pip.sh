#!/bin/sh
# pip for the image's environment. Installs from the wheelhouse if one is mounted, else as the build secrets configure.
set -eu
if [ -s /run/build/ca.pem ]; then
    export PIP_CERT=/run/build/ca.pem
fi
if ls /run/wheels/*.whl >/dev/null 2>&1; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=/run/wheels
fi
exec /opt/build/bin/pip --python /opt/venv/bin/python install --no-compile "$@"
