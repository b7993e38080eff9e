#!/usr/bin/env bash
# Set up .venv if needed, then run the linters and the tests.
#   bash launch/test.sh            everything: half an hour on two cores, less once all is compiled
#   bash launch/test.sh --fast     what to run on every save: 90 seconds; no types, and no
#                                  test marked `slow`
#   bash launch/test.sh campaign   hours: thousands of examples of each property, tests marked
#                                  `campaign`, and mutants of the code that decides what a judge is
#                                  worth (tests/mutate.py: at least 95 % must fail a test)
# Further arguments go to pytest. JLRM_TEST_WORKERS: processes (2).
# Tests that need torch, libtpu or reference data skip with a reason where these are absent.
set -euo pipefail
TIER=everything
case "${1:-}" in
  --fast) TIER=fast; shift ;;
  campaign) TIER=campaign; shift ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$ROOT"
export JAX_PLATFORMS=cpu
# By file, so that what a file sets up is set up once. A worker that crashes ends the run: otherwise
# xdist would wait for ever for the rest of that worker's file.
run_tests() {
  python -m pytest -n "${JLRM_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0 --tier "$TIER" "$@"
}

ruff check .
ruff format --check .
if [ "$TIER" = fast ]; then
  # Types wait for the whole run: they take as long as these tests. Nothing here compiles for long,
  # and a program that does must not hide in the cache.
  export JAX_ENABLE_COMPILATION_CACHE=false
  run_tests "$@"
  exit
fi
pyright --pythonpath "$ROOT/.venv/bin/python"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.1}"
if [ "$TIER" = everything ]; then
  run_tests "$@"
  advise
  exit
fi
run_tests "$@" && FAILED=0 || FAILED=$?
python tests/mutate.py --workers "${JLRM_TEST_WORKERS:-2}" || FAILED=$?
exit "$FAILED"
