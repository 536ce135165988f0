#!/bin/sh
# Makes sure of the parts that neither pip nor npm brings: Python 3.11 with its headers and
# venv, a C compiler and GMP (a libp2p dependency is compiled here), Node 18 with npm (the
# chain's tools).  As root on Debian or Ubuntu it installs what is missing; elsewhere it names
# what is missing and the command that installs it.  iproute2 and nftables are for the tests in
# network namespaces, which need root: where they cannot be installed, those tests are skipped.
set -eu

PYTHON="${PYTHON:-python3}"

has_python() {
    command -v "$PYTHON" >/dev/null 2>&1 &&
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
}

has_venv() {
    "$PYTHON" -c 'import ensurepip, venv' >/dev/null 2>&1
}

has_headers() {
    "$PYTHON" -c '
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

has_compiler() {
    command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1
}

has_gmp() {
    printf '#include <gmp.h>\nint main(void) { return 0; }\n' |
        "$(command -v cc || command -v gcc)" -xc - -lgmp -o /dev/null >/dev/null 2>&1
}

has_node() {
    command -v node >/dev/null 2>&1 &&
        node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)'
}

# What is missing now, as Debian names it; a part that needs another is asked for with it.
missing_packages() {
    if has_python; then
        has_venv || echo python3-venv
        has_headers || echo python3-dev
    else
        echo python3 python3-venv python3-dev
    fi
    if has_compiler; then
        has_gmp || echo libgmp-dev
    else
        echo gcc libc6-dev libgmp-dev
    fi
    # Some builds of nodejs bring npm and conflict with Debian's, so npm waits for its turn.
    if has_node; then
        command -v npm >/dev/null 2>&1 || echo npm
    else
        echo nodejs
    fi
}

# What only the tests in network namespaces need, and only root can use.
missing_lab_packages() {
    [ "$(uname -s)" = Linux ] && [ "$(id -u)" -eq 0 ] || return 0
    command -v ip >/dev/null 2>&1 && command -v tc >/dev/null 2>&1 || echo iproute2
    command -v nft >/dev/null 2>&1 || echo nftables
}

install() {
    echo "Installing system parts: $*"
    apt-get -q update </dev/null
    apt-get -q install -y --no-install-recommends "$@" </dev/null
}

lab_packages=$(missing_lab_packages | tr '\n' ' ')
if [ -n "$lab_packages" ]; then
    if command -v apt-get >/dev/null 2>&1; then
        export DEBIAN_FRONTEND=noninteractive
        # Unquoted: one word for each package.
        # shellcheck disable=SC2086
        install $lab_packages || echo "The tests in network namespaces will be skipped." >&2
    else
        echo "For the tests in network namespaces install (Debian's names): $lab_packages" >&2
    fi
fi

packages=$(missing_packages | tr '\n' ' ')
[ -n "$packages" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "Missing on this system (Debian's names): $packages" >&2
    echo "Install them with your package manager (on macOS: brew install python gmp node)," >&2
    echo "then run make again." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "Missing on this system: $packages" >&2
    echo "Run: sudo apt-get update && sudo apt-get install -y $packages" >&2
    exit 1
fi

export DEBIAN_FRONTEND=noninteractive
for _round in 1 2; do
    # Unquoted: one word for each package.
    # shellcheck disable=SC2086
    install $packages
    packages=$(missing_packages | tr '\n' ' ')
    [ -n "$packages" ] || exit 0
done

echo "apt-get has installed them, and these are still missing or too old: $packages" >&2
echo "Shoal needs Python 3.11 and Node 18 or newer; if another Python is first in PATH," >&2
echo "name the right one: make PYTHON=/usr/bin/python3" >&2
exit 1
