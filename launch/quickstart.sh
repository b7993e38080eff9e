#!/usr/bin/env bash
# Set up .venv if needed, then train a toy judge from random weights: SFT, then GRPO. CPU, no download.
# Further arguments are settings: bash launch/quickstart.sh run.dir=runs/other grpo.steps=50
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
cd "$ROOT"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
run_then_advise python -m jlrm.train --config configs/quickstart.yaml "$@"
