#!/usr/bin/env bash
# Makes .venv what the locks say, and says what it does. quickstart.sh, test.sh and lock.sh source it and call `set_up`.
#
#   set_up        the program
#   set_up test   the program and the test tools
#
# Safe to call at any time: a finished .venv costs a second and no network, one that was interrupted is made anew, and one
# that is older than the locks is brought up to date. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply.

TORCH=2.13.0

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONHOME PYTHONPATH

# A service account may have no home that can be written to: caches then go beside the checkout.
if [ ! -w "${HOME:-/nonexistent}" ]; then
  export HOME=$root/.home
  mkdir -p "$HOME"
fi

say() { printf '%s\n' "$*"; }

fail() {
  printf 'set-up: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf '  Try: %s\n' "$2" >&2
  exit 1
}

# $PYTHON if it is set, else python3; others only where python3 is too old.
find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$name
      return
    fi
  done
  fail "Python 3.11 or newer is needed, and no such python3 was found." "sudo apt-get install python3 python3-venv"
}

# An empty .venv with pip. Debian splits ensurepip into python3-venv; a pip that is there already does as well.
make_venv() {
  find_python
  say "set-up: making .venv with $("$python" --version)"
  if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
  elif "$python" -c 'import pip, venv' 2>/dev/null; then
    "$python" -m venv --clear --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install -q --require-hashes --no-deps -r "$root/scripts/build.lock" ||
      offline
  else
    fail "$python has neither venv nor pip." "sudo apt-get install python3-venv"
  fi
}

offline() {
  fail "pip could not install a locked package (its own words are above). It needs a package index the first time." \
    "set PIP_INDEX_URL or PIP_FIND_LINKS to a mirror that you can reach, then run this again"
}

# Modules are compiled at the end, by all processors; pip does it one after the other.
install() { "$venv/bin/python" -m pip install -q --no-compile "$@" || offline; }

locked() { install --require-hashes --no-deps --no-build-isolation -r "$1"; }

# What a finished .venv is the result of. The path is part of it: an editable install points to this checkout.
fingerprint() {
  (cd -- "$root" && printf '%s\n' "$root" "$TORCH" &&
    cat pyproject.toml scripts/build.lock requirements.lock ${1:+tests/requirements.lock}) | "$venv/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

set_up() {
  local extra=${1:-} stamp started
  stamp=$venv/.finished${extra:+-$extra} started=$venv/.started

  if command -v flock >/dev/null; then # two set-ups at once take turns
    exec 9>"$root/.venv.lock"
    flock -n 9 || { say "set-up: waiting for another set-up of this checkout" && flock 9; }
  fi

  if [ -e "$started" ] || ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    [ ! -e "$venv" ] || say "set-up: .venv was not finished; making it anew"
    make_venv
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint "$extra")" ]; then
    rm -f "$venv"/.finished*
    touch "$started"
    say "set-up: 1/4 build tools (scripts/build.lock)"
    install --require-hashes --no-deps -r "$root/scripts/build.lock"
    say "set-up: 2/4 locked packages (requirements.lock${extra:+, tests/requirements.lock}); some minutes the first time"
    locked "$root/requirements.lock"
    [ -z "$extra" ] || locked "$root/tests/requirements.lock"
    say "set-up: 3/4 torch $TORCH; the largest download"
    # The lock without its hashes, which pip would otherwise demand of torch too: no other pin may move.
    sed -n 's/^\([A-Za-z0-9._-]*==[^ ]*\).*/\1/p' "$root/requirements.lock" >"$venv/constraints.txt"
    install -c "$venv/constraints.txt" "torch==$TORCH"
    say "set-up: 4/4 finetune itself, from this checkout"
    install --no-deps --no-build-isolation -e "$root"
    # Some packages carry files for other Pythons: these stay as they are.
    "$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python*/site-packages >/dev/null 2>&1 || true
    "$venv/bin/python" -m pip check || fail "the installed packages do not fit together (see above)." "rm -rf $venv"
    fingerprint "$extra" >"$stamp"
    [ -z "$extra" ] || fingerprint >"$venv/.finished"
    rm "$started"
  fi
  if command -v flock >/dev/null; then
    exec 9>&-
  fi
}
