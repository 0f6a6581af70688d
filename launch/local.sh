#!/usr/bin/env bash
# Training on this machine, with a process for each of its GPUs, or one without any:
#   launch/local.sh --config configs/base.yaml [--phase b] [--fresh] [key=value …]
# On several machines that share a disk, without a scheduler: on each the same, but for its own number.
#   MACHINES=2 MACHINE=0 HEAD=10.0.0.1 launch/local.sh --config configs/base.yaml     # 10.0.0.1 is this one
#   MACHINES=2 MACHINE=1 HEAD=10.0.0.1 launch/local.sh --config configs/base.yaml
# Over ssh, for one that gives each machine the project's folder under the same name:
#   ssh 10.0.0.2 "cd $PWD && MACHINES=2 MACHINE=1 HEAD=10.0.0.1 launch/local.sh --config configs/base.yaml"
# The environment may say more:
#   LAUNCH           a file of launch/accelerate/ without .yaml, or a path (zero2; single_gpu for one process)
#   PROCESSES        on this machine
#   PORT             where machine 0 listens (29500); another job there needs another
#   WAIT             seconds to wait for the other machines (300)
#   OMP_NUM_THREADS  (a process's share of this machine's cores)
#   VENV, PYTHON     see launch/python.sh
# launch/slurm.sh starts this on each of its nodes.
set -euo pipefail

MACHINES=${MACHINES:-1} MACHINE=${MACHINE:-0} PORT=${PORT:-29500} WAIT=${WAIT:-300}
NEWS=15 # seconds between two lines about a head that does not answer

refuse() {
  echo "local.sh: $*" >&2
  exit 2
}

# Processes on this machine.
count_gpus() {
  local found=0
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    found=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
  elif command -v nvidia-smi >/dev/null; then
    found=$(nvidia-smi --list-gpus | grep -c '^GPU' || true)
  fi
  echo $((found > 0 ? found : 1))
}

# Sets `launch_file`.
choose_launch_file() {
  local launch=${LAUNCH:-}
  [[ -n $launch ]] || { ((processes > 1)) && launch=zero2 || launch=single_gpu; }
  launch_file=$launch
  [[ $launch == */* || $launch == *.yaml ]] || launch_file=launch/accelerate/$launch.yaml
  [[ -f $launch_file ]] || refuse "LAUNCH=$launch: there is no $launch_file"
  if ((processes > 1)) && grep -q "^distributed_type: *'\?NO" "$launch_file"; then
    refuse "LAUNCH=$launch is for one process, and these are $processes: zero2 would do"
  fi
}

# Whether somebody answers at the head's port; if not, it prints why.
# shellcheck disable=SC2016
knock() { timeout 5 bash -c ': >"/dev/tcp/$0/$1"' "$HEAD" "$PORT" 2>&1; }

# Says why not, again and again: torch's own attempts are silent.
reach_head() {
  local began=$SECONDS told=$SECONDS reason
  until reason=$(knock); do
    reason=${reason%%$'\n'*}
    reason=${reason##*:}
    reason=${reason:- no answer}
    ((SECONDS - began < WAIT)) || refuse "machine $MACHINE ($(hostname)): nobody at $HEAD:$PORT for $WAIT s:$reason"
    if ((SECONDS - told >= NEWS)); then
      echo "local.sh: machine $MACHINE ($(hostname)) waits for machine 0 at $HEAD:$PORT:${reason}." \
        "It has not begun yet, or a firewall is between" >&2
      told=$SECONDS
    fi
    sleep 1
  done
}

[[ -f train.py ]] || refuse "no train.py in $PWD: start it in the project's folder"
here=${PROCESSES:-$(count_gpus)}
((here > 0)) || refuse "PROCESSES=$here: at least one is needed"
processes=$((MACHINES * here))
choose_launch_file
flags=(--config_file "$launch_file" --num_processes "$processes" --num_machines "$MACHINES" --machine_rank "$MACHINE")
if ((MACHINES > 1)); then
  [[ -n ${HEAD:-} ]] || refuse "HEAD=… is missing: the address under which the others reach machine 0"
  ((MACHINE < MACHINES)) || refuse "MACHINE=$MACHINE: of $MACHINES they are 0 to $((MACHINES - 1))"
  # Each machine starts its own processes; DeepSpeed's default would reach out over ssh. With `static` machine 0 is
  # sure to have rank 0.
  flags+=(--main_process_ip "$HEAD" --main_process_port "$PORT" --deepspeed_multinode_launcher standard)
  flags+=(--rdzv_backend static --rdzv_conf "timeout=$WAIT")
  if ((MACHINE > 0)); then
    reach_head
  elif knock >/dev/null; then
    refuse "PORT=$PORT on $HEAD is taken, perhaps by another job: another one, on all machines, would do"
  else
    echo "local.sh: machine 0 of $MACHINES at $HEAD:$PORT waits up to $WAIT s for the others" >&2
  fi
fi
cores=$(($(nproc) / here))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores : 1))}
exec launch/python.sh -m accelerate.commands.launch "${flags[@]}" train.py "$@"
