#!/usr/bin/env bash
# What the sbatch files have in common: take the environment as it is, or say how to make it, and start the job's program.
#   start.sh pretrain|extend|eval      in the repository, inside a job
set -euo pipefail

venv=${VENV:-.venv}
if [[ ! -x $venv/bin/python ]]; then
    echo "error: there is no environment in $venv; run \`make setup${VENV:+ VENV=$VENV}\` on the login node" >&2
    exit 2
fi
export PATH # --export without ALL leaves it unset, and bash's default unexported
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$venv/bin/python" -m scripts.slurm.job "$1"
