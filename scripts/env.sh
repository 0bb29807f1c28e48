# Sourced by the other scripts: finds Python 3.11 or newer, makes .venv and installs the package in it, once.
#   setup_venv [EXTRA]    e.g. setup_venv test

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with venv was found; install one, or set PYTHON=/path/to/python" >&2
    return 2
}

setup_venv() {
    local target=".${1:+[$1]}" python stamp
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python)
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    # Installed already from this setup.cfg, with this extra or (for none) with any? Then start at once.
    for stamp in .venv/installed"${1:+-$1}"*; do
        cmp -s setup.cfg "$stamp" && return
    done
    echo "installing $target"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$target"
    cp setup.cfg ".venv/installed${1:+-$1}"
}
