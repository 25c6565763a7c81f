#!/bin/sh
# Makes .venv from a lock: `scripts/setup.sh cpu` or `gpu`. Called by make; safe to call again.
# --no-deps throughout: a resolver would pull packages that have no CPU build and then break the imports.
set -eu
set_name=${1:-cpu}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
    echo "plumbline needs Python 3.11 to 3.13; $python is $("$python" --version 2>&1). Set PYTHON=python3.11" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
echo "installing locks/$set_name.txt into .venv (a few minutes the first time)"
if [ "$set_name" = cpu ]; then
    torch=$(grep '^torch==' locks/cpu.txt)
    # Some indexes and wheel folders have the CPU build; elsewhere it is on PyTorch's own index.
    pip install -qq --no-deps "$torch" 2>/dev/null ||
        pip install -qq --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
fi
pip install -qq --no-deps -r "locks/$set_name.txt"
pip install -qq --no-deps --no-build-isolation -e .
.venv/bin/python -c 'import pydantic, ray, torch, transformers, plumbline'
