# Sourced by the sbatch files beside it: reads the scheduler's environment, prints what it runs, and asks the scheduler
# to start a preempted job again.
# shellcheck shell=bash

fail() {
  echo "sdft_ds: $*" >&2
  exit 1
}

# Sets OUTPUT_DIR, MASTER_ADDR, MASTER_PORT and TRAIN, the arguments of launch/train.py. With --dry-run as the first
# argument DRY_RUN is set: the job prints its command and ends; outside a job it has the nodes and GPUs of the script's
# header, or of sbatch's options among the arguments. DEEPSPEED_CONFIG: of ds_configs/, unless --deepspeed says another.
prepare() {
  DRY_RUN=
  if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=yes
    shift
  elif [ -z "${SLURM_JOB_ID:-}" ]; then
    fail "this is a job: submit it with sbatch from the repository's folder, or run it with --dry-run to see its command."
  fi
  ARGUMENTS=("$@")
  [ -n "${SLURM_JOB_ID:-}" ] || as_sbatch_would "$@"
  cd "${SLURM_SUBMIT_DIR:-.}" || fail "no folder $SLURM_SUBMIT_DIR on this node: submit from a shared file system."
  [ -e launch/train.py ] || fail "no launch/train.py in $PWD: submit from the repository's folder."
  if [ -d .venv/bin ]; then
    export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
  fi

  OUTPUT_DIR="runs/${SLURM_JOB_NAME:-job}-${SLURM_JOB_ID:-0}" # the job id stays the same when the job is started again
  TRAIN=(--deepspeed "ds_configs/${DEEPSPEED_CONFIG:-zero2}.json" --resume_from_checkpoint true --save_strategy steps)
  OUTPUT_DIR=$(argument output_dir "${ARGUMENTS[@]}" || echo "$OUTPUT_DIR")
  TRAIN+=(--output_dir "$OUTPUT_DIR" "${ARGUMENTS[@]}") # of a flag that is there twice the last one counts

  MASTER_ADDR=$(hostnames | head -n 1)
  MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
  export MASTER_ADDR MASTER_PORT OUTPUT_DIR
}

# For a dry run outside a job: sets the scheduler's variables that are unset from the script's header and from sbatch's
# options about the name, nodes, tasks, GPUs and CPUs among the arguments, which win and are left out of ARGUMENTS.
as_sbatch_would() {
  local line each name value pending=''
  while read -r line; do
    if [[ $line =~ ^#SBATCH\ --([a-z-]+)=([^ ]+) ]]; then size "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"; fi
  done <"$0"
  ARGUMENTS=()
  for each in "$@"; do
    if [ -n "$pending" ]; then
      size "$pending" "$each"
      pending=''
      continue
    fi
    name=${each%%=*} value=''
    [[ $each != *=* ]] || value=${each#*=}
    case $name in
      -N) name=--nodes ;;
      --gpus | -G)
        echo "sdft_ds: $each is of the whole job; a dry run takes each node's GPUs from --gpus-per-node." >&2
        ;;
      # Of sbatch, and without effect on what a dry run shows.
      -A | -p | -t | -q | -w | -x | -C | -d | --account | --partition | --time | --qos | --nodelist | --exclude | \
        --constraint | --dependency | --reservation | --mem | --mail-type | --mail-user | --output | --error | --begin) ;;
      --job-name | --nodes | --ntasks-per-node | --gpus-per-node | --cpus-per-task) ;;
      *)
        ARGUMENTS+=("$each")
        continue
        ;;
    esac
    if [ -n "$value" ]; then size "${name#--}" "$value"; else pending=${name#--}; fi
  done
  SLURM_JOB_NAME=${SLURM_JOB_NAME:-${NAME_ASKED:-job}}
  SLURM_NNODES=${SLURM_NNODES:-${NODES_ASKED:-1}}
  SLURM_NTASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-${TASKS_ASKED:-1}}
  SLURM_GPUS_ON_NODE=${SLURM_GPUS_ON_NODE:-${GPUS_ASKED:-1}}
  SLURM_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${CPUS_ASKED:-1}}
}

size() {
  case $1 in
    job-name) NAME_ASKED=$2 ;;
    nodes) NODES_ASKED=$2 ;;
    ntasks-per-node) TASKS_ASKED=$2 ;;
    gpus-per-node) GPUS_ASKED=${2##*:} ;; # h100:8
    cpus-per-task) CPUS_ASKED=$2 ;;
  esac
}

# The value of a setting among the arguments, by one of its names (in one word, separated by spaces); fails without it.
argument() {
  local names=" $1 " wanted='' value='' each name
  shift
  for each in "$@"; do
    if [ -n "$wanted" ]; then
      value=$each wanted=''
      continue
    fi
    name=${each%%=*}
    name=${name#--}
    if [[ $each == --* && $names == *" ${name//-/_} "* ]]; then
      if [[ $each == *=* ]]; then value=${each#*=}; else wanted=yes; fi
    fi
  done
  [ -n "$value" ] && echo "$value"
}

# Outside a job: node1, node2 and so on.
hostnames() {
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    scontrol show hostnames "$SLURM_JOB_NODELIST"
  else
    seq --format 'node%g' "${SLURM_NNODES:-1}"
  fi
}

# Processes on each node: NPROC_PER_NODE, else the scheduler's GPUs, else one.
processes_per_node() {
  echo "${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
}

# Runs the command, which may be told to save and leave by a signal that this shell gets as well. Launchers lose exit
# codes, so what happened is read from the marker that training leaves.
run_and_requeue() {
  echo "job ${SLURM_JOB_ID:-?}, start $((${SLURM_RESTART_COUNT:-0} + 1)), nodes $(hostnames | tr '\n' ' ')${SLURM_GPUS_ON_NODE:+with $SLURM_GPUS_ON_NODE GPUs each }into $OUTPUT_DIR"
  printf '+'
  printf ' %q' "$@"
  echo
  [ -z "$DRY_RUN" ] || exit 0
  trap 'echo "job $SLURM_JOB_ID: told to end; waiting for the checkpoint"' TERM USR1
  "$@" &
  local child=$! status=0
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # wait is interrupted by the signal
    wait "$child" && status=0 || status=$?
  done
  if [ -e "$OUTPUT_DIR/PREEMPTED" ]; then
    cat "$OUTPUT_DIR/PREEMPTED"
    # A job that was cancelled, or stopped by the file STOP, is not started again.
    if ! grep -q '"by": "STOP"' "$OUTPUT_DIR/PREEMPTED" && still_wanted; then
      echo "job $SLURM_JOB_ID: saved; to be started again"
      scontrol requeue "$SLURM_JOB_ID"
      sleep 60 # the scheduler ends this script
    fi
  fi
  exit "$status"
}

still_wanted() {
  case $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) in
    CANCELLED | COMPLETING | "") return 1 ;;
  esac
}
