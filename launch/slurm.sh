#!/usr/bin/env bash
# A run as a SLURM job that checkpoints before its time is up, requeues itself and goes on until it is finished:
#   sbatch [sbatch options] launch/slurm.sh --config configs/large.yaml [--phase b] [--fresh] [key=value …]
# What a site needs are sbatch options (--nodes, --gpus-per-node, --cpus-per-task, --time, --partition, --account …;
# --signal=B:USR1@600 where a checkpoint takes long) or the environment:
#   LAUNCH              a file of launch/accelerate/ without .yaml, or a path (zero2; single_gpu for one process)
#   PROCESSES_PER_NODE  (the GPUs that the job has on a node; 1 without any)
#   OMP_NUM_THREADS     (a process's share of the job's CPUs on a node)
#   VENV, PYTHON        see launch/python.sh
#SBATCH --job-name=hybrid-dist
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
# (A --time of not much more than these 300 s would leave no time to train.)
set -euo pipefail

TRIES=2 # starts in a row without a new checkpoint, after which it is not tried again

say() { echo "$(date +%FT%T) slurm.sh: $*"; }

end_job() { # CODE WHY…: for good
  local code=$1
  shift
  [[ -z ${memory:-} ]] || rm -f "$memory"
  say "$*"
  exit "$code"
}

# It may have been requeued, so what it knows of its starts stays.
ended_by_slurm() { # WHEN
  say "ended by SLURM (scancel, or a node that is gone) $1; where it does not go on by itself, submit again"
  exit 75
}

# Sets `nodes`; and, for launch/local.sh, `PROCESSES` and `OMP_NUM_THREADS`.
look_around() {
  [[ -n ${SLURM_JOB_ID:-} ]] || end_job 2 "not in a SLURM job: sbatch launch/slurm.sh --config …"
  [[ -f train.py ]] || end_job 2 "no train.py in $PWD: submit from the project's folder, or with --chdir"
  nodes=${SLURM_JOB_NUM_NODES:-1}
  PROCESSES=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  ((PROCESSES > 0)) || PROCESSES=1
  local cpus=$((${SLURM_CPUS_ON_NODE:-1} / PROCESSES))
  export PROCESSES OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 1 ? cpus : 1))}
}

# Sets `folder`, `step` (of the newest checkpoint), `state`, `reason`, `written`, `left`, `sentence`.
look_at_run() {
  local lines
  if ! lines=$(launch/python.sh -m hybrid_dist.standing "$@"); then
    [[ -z $asked ]] || ended_by_slurm "while it looked at the run"
    [[ -n ${training:-} ]] || end_job 2 "not started, see above; submit again once it is right"
    sleep 10 # the disk may have had a moment
    lines=$(launch/python.sh -m hybrid_dist.standing "$@") ||
      end_job 2 "the run can't be looked at any more, see above; submit again once it is right"
  fi
  # shellcheck disable=SC2034  # `left` is phases.sh's
  { read -r folder; read -r step; read -r state; read -r reason; read -r written; read -r left; read -r sentence; } \
    <<<"$lines"
}

# Of the run that stands there: its config is written anew by each start.
identity() { stat -c %i-%Y "$folder/config.yaml" 2>/dev/null || echo none; }

# Whether SLURM knows no more of a job; not if it does not answer.
is_over() { # JOB
  local said
  said=$(squeue --noheader --job "$1" 2>&1) || [[ $said == *"Invalid job id"* ]] || return 1
  [[ -z $said || $said == *"Invalid job id"* ]]
}

# What a job knows of its earlier starts lies beside the run's folder, which may not be there yet:
# the starts in a row without a new checkpoint, and which run stood there at first.
remember() { mkdir -p "${memory%/*}" && echo "$tries $first" >"$memory"; }

recall() {
  local all old
  all=$(dirname "$folder")/.$(basename "$folder").job-
  memory=$all$SLURM_JOB_ID
  for old in "$all"*; do
    [[ $old == "$memory" || ! -e $old ]] || ! is_over "${old#"$all"}" || rm -f "$old"
  done
  tries=0
  first=$(identity)
  if ((${SLURM_RESTART_COUNT:-0} > 0)); then
    first=lost
    [[ ! -s $memory ]] || read -r tries first <"$memory"
  fi
}

# --fresh means one fresh start, not one after each requeue: once another run stands there, it has been followed.
drop_followed_fresh() {
  [[ $(identity) != "$first" ]] || return 0
  local kept=() argument
  for argument in "${arguments[@]}"; do
    [[ $argument == --fresh ]] || kept+=("$argument")
  done
  arguments=("${kept[@]}")
}

look_again() {
  drop_followed_fresh
  look_at_run "${arguments[@]}"
}

# One launch/local.sh a node, in the background; sets `training`.
start_training() {
  local head address
  read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # The address under which SLURM itself reaches it; where a site sets none, that is its name.
  address=$(scontrol --oneliner show node "$head" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2) || address=$head
  export MACHINES=$nodes HEAD=$address
  # Below the range from which systems take ports for outgoing connections.
  export PORT=$((20000 + SLURM_JOB_ID % 10000))
  # Without binding a task sees all of the job's CPUs on its node. A node whose task has ended waits for the others:
  # they may be writing; not for ever, for they may be stuck for want of it. srun takes no CPUs per task from sbatch.
  local srun=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --wait=120 --export=ALL)
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
  # The rank of a node is known there alone.
  # shellcheck disable=SC2016
  "${srun[@]}" bash -c 'MACHINE=$SLURM_NODEID exec launch/local.sh "$@"' local.sh "${arguments[@]}" &
  training=$!
}

# Again and again: training removes a file from before it began, and there may be no folder of this run yet.
ask_to_stop() { [[ ! -f $folder/config.yaml || -e $folder/STOP ]] || touch "$folder/STOP" || true; }

# Sets `code`; and, if it was asked to stop for want of time, `time_is_up`: when that is, in seconds, 0 if unknown.
wait_for_training() {
  time_is_up=0
  code=0
  [[ -n $asked ]] || wait "$training" || code=$?
  if [[ -n $asked ]]; then # before the wait, or the trap has ended it
    say "$asked: asking training to checkpoint and stop"
    local end
    end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e) || end=
    time_is_up=$(date +%s -d "${end:-unknown}" 2>/dev/null) || time_is_up=0
    while kill -0 "$training" 2>/dev/null; do
      ask_to_stop
      sleep 1
    done
    code=0
    wait "$training" || code=$?
    rm -f "$folder/STOP"
  fi
}

# What training has said of this start's failure, from this job's log; nothing if it has said nothing, or elsewhere.
last_words() {
  local log
  log=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* StdOut=\([^ ]*\).*/\1/p') || return 0
  [[ -r $log ]] || return 0
  awk '/ slurm\.sh: job [0-9]+, start / { said = "" } /^(train\.py|local\.sh): |Dist[A-Z][a-z]*Error: / { said = $0 } END { print said }' "$log"
}

# What became of this start, in words.
describe_end() {
  if ((written == written_before)); then
    local said
    said=$(last_words)
    echo "it failed before training began: ${said:-exit $code, see above}"
  elif [[ $state == running ]]; then
    echo "it ended without a word (exit $code)"
  else
    echo "$state: $reason"
  fi
}

# Whether SLURM has ended the job already, and it is not for want of time or for a job that goes first.
is_ended() {
  local facts
  facts=$(scontrol --oneliner show job "$SLURM_JOB_ID") || return 1
  [[ $facts != *JobState=RUNNING* && $facts == *PreemptTime=None* ]] || return 1
  [[ $asked != USR1 ]] || ((time_is_up == 0 || $(date +%s) < time_is_up))
}

# After a start that did not finish: requeue, or say why not.
go_on_or_give_up() {
  local written_before=$written step_before=$step end
  look_again
  end=$(describe_end)
  if is_ended; then
    ended_by_slurm "at step $step ($end)"
  elif [[ -z $asked && $end == "stopped: a STOP file" ]]; then
    end_job 75 "stopped at step $step by somebody's STOP file; submit again to go on"
  elif ((step > step_before)); then
    tries=0
  elif [[ $asked != TERM ]]; then # to be preempted early is nobody's fault
    tries=$((tries + 1))
  fi
  ((tries < TRIES)) || end_job 1 "given up: $tries starts in a row without a new checkpoint (step $step); the last: $end"
  remember
  say "requeued at step $step ($end)"
  # It fails where SLURM has done it already, for preemption without time for this, and where the site forbids it.
  scontrol requeue "$SLURM_JOB_ID" || say "requeueing failed, see above: if the job is gone, submit again to go on"
  exit 75
}

main() {
  asked=
  trap ': "${asked:=USR1}"' USR1
  trap ': "${asked:=TERM}"' TERM
  arguments=("$@")
  look_around
  look_at_run "${arguments[@]}"
  recall
  look_again
  remember
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $nodes × $PROCESSES processes: $sentence"
  start_training
  wait_for_training
  if ((code == 0)); then
    look_again
    end_job 0 "done: $sentence"
  fi
  go_on_or_give_up
}

main "$@"
