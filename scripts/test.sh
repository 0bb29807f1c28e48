#!/usr/bin/env bash
# Installs what the tests need and runs the linters and the default test suite; arguments go to pytest.
#   bash scripts/test.sh                 about 10 minutes on 2 cores, two test files at a time
#   bash scripts/test.sh -m slow         likewise: -m fault
#   bash scripts/test.sh -m mesh         every family over every mesh, an hour; writes tests/MESHES.md
#   bash scripts/test.sh -m gpu -n 0     one at a time, as they share the GPU's memory
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

setup_venv test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [[ " $* " == *" -m mesh "* ]]; then
    export BIGMODEL_TEST_DEVICES=16 BIGMODEL_MESH_ROWS="${BIGMODEL_MESH_ROWS:-$(mktemp)}"
    .venv/bin/python -m pytest -n 2 --dist=loadgroup "$@"
    .venv/bin/python tests/mesh_table.py "$BIGMODEL_MESH_ROWS"
    exit
fi
.venv/bin/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder "$@"
