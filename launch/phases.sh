#!/usr/bin/env bash
# A run's phases as jobs of their own, each after the one before, and each with what it needs:
#   PHASE_A="--nodes=1 --time=1:00:00" LAUNCH_A=ddp PHASE_C="--nodes=4 --time=24:00:00" LAUNCH_C=zero3 \
#     launch/phases.sh --config configs/large.yaml [--fresh] [key=value …]
# PHASE_NAME are sbatch options, LAUNCH_NAME a launch file, for launch/slurm.sh; SBATCH_OPTIONS and LAUNCH are for all.
# Finished phases are left out, so the same command again goes on; what it submitted before is waited for.
set -euo pipefail

# The value of variable PREFIX_NAME, NAME in capitals; else $3.
setting() {
  local variable=$1_${2^^}
  variable=${variable//[^A-Z0-9_]/_}
  echo "${!variable:-$3}"
}

# Prints the job's number.
submit() { # PHASE DEPENDENCY ARGUMENTS…
  local phase=$1 dependency=$2 options launch
  shift 2
  read -ra options <<<"${SBATCH_OPTIONS:-} $(setting PHASE "$phase" "")"
  launch=$(setting LAUNCH "$phase" "${LAUNCH:-}")
  # A job that waits for one that has failed would wait for ever.
  LAUNCH=$launch sbatch --parsable --export=ALL --kill-on-invalid-dep=yes --job-name="$(basename "$folder")-$phase" \
    ${dependency:+--dependency="$dependency"} ${options[@]+"${options[@]}"} launch/slurm.sh "$@" --phase "$phase" | cut -d ';' -f 1
}

lines=$(launch/python.sh -m hybrid_dist.standing "$@")
{ read -r folder; for _ in 1 2 3 4; do read -r _; done; read -r left; read -r sentence; } <<<"$lines"
echo "$sentence"
[[ -n $left ]] || exit 0

# Two jobs can't be in a run's folder at once: those that an earlier call has submitted come first.
names=$(for phase in $left; do echo "$(basename "$folder")-$phase"; done | paste -sd ,)
earlier=$(squeue --noheader --user="$(id -un)" --name="$names" --format=%i | paste -sd :)
dependency=${earlier:+afterany:$earlier}
arguments=("$@")
for phase in $left; do
  job=$(submit "$phase" "$dependency" "${arguments[@]}")
  echo "phase $phase: job $job"
  dependency=afterok:$job
  # To start over is for the first of them.
  for index in "${!arguments[@]}"; do
    [[ ${arguments[index]} != --fresh ]] || unset "arguments[index]"
  done
done
