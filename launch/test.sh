#!/usr/bin/env bash
# Set up .venv if needed, then run the linters and the whole test suite. Further arguments go to pytest.
# Tests that need torch, libtpu or reference data skip with a reason where these are absent.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$ROOT"
ruff check .
ruff format --check .
pyright --pythonpath "$ROOT/.venv/bin/python"
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-1}"
# By file, so that what a file sets up is set up once.
exec python -m pytest -n "${JLRM_TEST_WORKERS:-2}" --dist loadfile "$@"
