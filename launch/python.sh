#!/usr/bin/env bash
# The project's Python, with these arguments: PYTHON=… names one, VENV=… its environment; else .venv, else python3.
set -euo pipefail

python=${PYTHON:-${VENV:-.venv}/bin/python}
[[ -n ${PYTHON:-}${VENV:-} || -x $python ]] || python=python3
if ! command -v "$python" >/dev/null; then
  echo "${0##*/}: there is no $python: VENV=… or PYTHON=… names one" >&2
  exit 2
fi
exec "$python" "$@"
