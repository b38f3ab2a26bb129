#!/usr/bin/env bash
# Builds .venv from requirements.lock, with the system packages FFCV needs. Every make target calls this first.
#
# .venv/.set-up says what .venv holds: "building" while the work goes on, then "ready <hash of the lock> <clone>".
#   ready, same lock     nothing to do
#   ready, another lock  install the difference in place
#   anything else        interrupted, or the clone was moved: build from nothing (pip's cache makes it quick)
#
# PYTHON=/path/to/python3.12 chooses the interpreter; otherwise the first of python3, python3.12, ... that will do.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
state=.venv/.set-up
wanted="ready $(sha256sum <requirements.lock | cut -c 1-64) $root"
PATH=${PATH//"$root/.venv/bin:"/} # an activated .venv must not build itself

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() { printf 'set-up: %s\n' "$*"; }

# True when .venv runs and sees its packages (a system upgrade may have changed the Python underneath).
works() {
    .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' 2>/dev/null
}

read_state() { cat "$state" 2>/dev/null || true; }

if [ "$(read_state)" = "$wanted" ] && works; then exit 0; fi

case $root in *[[:space:]]*) fail "this clone lies in '$root': DeepSpeed's launcher cannot run from a path with a space; move it" ;; esac

# --- System packages: looked for without network, installed through apt where allowed -------------------------------

python= # the interpreter to build .venv from
apt=()  # Debian packages that are missing

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python3.14 python}; do
        # The lock holds wheels for 3.11 to 3.14. A pyenv shim may exist and yet not run, so run it.
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            python=$candidate
            return
        fi
    done
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python from 3.11 to 3.14; unset it or name another"
}

find_missing() {
    apt=()
    hash -r
    find_python
    if [ -z "$python" ]; then
        apt+=(python3 python3-venv python3-dev)
    else
        local version
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        "$python" -c 'import venv, ensurepip' 2>/dev/null || apt+=("python$version-venv")
        "$python" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
            apt+=("python$version-dev")
    fi
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || apt+=(g++)
    command -v pkg-config >/dev/null || apt+=(pkg-config)
    pkg-config --exists opencv4 2>/dev/null || apt+=(libopencv-dev)
    pkg-config --exists libturbojpeg 2>/dev/null || apt+=(libturbojpeg0-dev)
}

install_missing() {
    command -v apt-get >/dev/null || return 1
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || return 1
        [ -t 0 ] || sudo -n true 2>/dev/null || return 1 # nobody there to type a password
        as_root=(sudo)
    fi
    say "installing ${apt[*]} through apt"
    as_root+=(env DEBIAN_FRONTEND=noninteractive apt-get -q)
    "${as_root[@]}" update </dev/null >&2 || return 1
    if [ -z "$python" ]; then # the release's own Python may be too old (Ubuntu 22.04) with a newer one beside it
        local version
        for version in 3.12 3.13 3.11 3.14; do
            if apt-cache show "python$version-venv" >/dev/null 2>&1; then
                apt=("${apt[@]/#python3/python$version}")
                break
            fi
        done
    fi
    "${as_root[@]}" install -y --no-install-recommends "${apt[@]}" </dev/null >&2
}

need_system_packages() {
    find_missing
    [ "${#apt[@]}" != 0 ] || return 0
    if install_missing; then find_missing; fi
    [ "${#apt[@]}" != 0 ] || return 0
    local what="system packages are"
    [ -n "$python" ] || what="Python 3.11 to 3.14 and system packages are"
    fail "$what missing, and they cannot be installed from here; install them and run the same command again:
  Debian, Ubuntu:  sudo apt-get install -y ${apt[*]}
  conda:           conda install -c conda-forge python=3.12 gxx pkg-config libjpeg-turbo opencv make"
}

# --- The environment ------------------------------------------------------------------------------------------------

need_system_packages

mkdir -p .venv
exec 9>.venv/.lock
if command -v flock >/dev/null; then # two make calls at once: the second waits, then finds the work done
    flock -n 9 || { say "waiting for another set-up of this clone" && flock 9; }
fi

case "$(read_state)" in
    "$wanted") if works; then exit 0; fi ;;
    ready\ *\ "$root") ;;
    "")
        [ -z "$(find .venv -mindepth 1 ! -name .lock -print -quit)" ] ||
            fail ".venv was not made by make; remove or rename it (rm -r .venv) and run the same command again"
        ;;
esac

before=$(read_state)
printf 'building\n' >"$state"
case "$before" in
    ready\ *\ "$root") if works; then say "requirements.lock changed: updating .venv"; else before=; fi ;;
    *) before= ;;
esac
if [ -z "$before" ]; then
    say "building .venv with $("$python" --version) (minutes; about 6 GB)"
    find .venv -mindepth 1 -maxdepth 1 ! -name .lock ! -name .set-up -exec rm -rf {} +
    "$python" -m venv .venv </dev/null || fail "$python -m venv .venv failed"
fi

# pip itself, and the tools that build ffcv and deepspeed from source, come from the lock too, so that an old pip or a
# new setuptools changes nothing. Only what matches a hash is installed: a local "+cpu" build of torch does not.
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" </dev/null; }
quiet=-q
[ ! -t 1 ] || quiet=
awk '/^pip==/ { on = 1 } on { print } on && !/\\$/ { exit }' requirements.lock >.venv/pip.txt
grep -oE '^(setuptools|wheel)==[^ ]+' requirements.lock >.venv/build.txt
pip install -q --require-hashes -r .venv/pip.txt &&
    pip install $quiet --require-hashes --build-constraint .venv/build.txt -r requirements.lock ||
    fail "pip could not install requirements.lock (its message is above); mend it and run the same command again"

site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$root" >"$site/unsoftmax_clone.pth"

.venv/bin/python -c 'import cv2, deepspeed, ffcv, timm' >.venv/imports.log 2>&1 || {
    tail -n 5 .venv/imports.log >&2
    fail "what was installed does not import (above); remove .venv and run the same command again"
}

printf '%s\n' "$wanted" >"$state.new"
mv "$state.new" "$state"
say "ready"
