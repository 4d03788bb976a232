# What slurm.sbatch and slurm-gpu.sbatch share; they source it after `cd` to the repository.
#
# ISOBATH_PROGRAM names the program to start; without it slurm.sbatch takes build/cpu/bin/isobath, slurm-gpu.sbatch
# build/cuda/bin/isobath. ISOBATH_ROOT names the repository; without it it is where the job was submitted.
source launch/setup.sh

# The run directory of a config and the arguments after it, of which `check` takes --set alone.
isobath_output() {
  local program=$1 config=$2 settings=()
  shift 2
  while (($#)); do
    case $1 in
      --set) settings+=("$1" "${2-}") && shift ;;
      --set=*) settings+=("$1") ;;
    esac
    shift
  done
  isobath_value_of "$program" output "$config" --ranks "$SLURM_NTASKS" "${settings[@]}"
}

# What a resumed run need not do again: the finished stages and the newest generation; empty when that is nothing.
isobath_progress() {
  tr -d ' \n' 2>/dev/null <"$1/run.json" | grep -oE '"complete":\["[^]]*\]'
  compgen -G "$1/checkpoint/gen-*[0-9]" | sort | tail -n 1
}

# Runs config with the arguments after it on all tasks of the job; queues the job again when it was stopped, unless it
# got nowhere: the next one would not either.
isobath_run() {
  local config=$1 program=${ISOBATH_PROGRAM:-build/cpu/bin/isobath} output before status
  # mpirun passes USR1 on to every rank. TERM would leave them two seconds, too few to save anything.
  isobath_pid='' isobath_is_stopped=''
  trap 'isobath_is_stopped=1; [[ -z $isobath_pid ]] || kill -USR1 "$isobath_pid"' USR1
  output=$(isobath_output "$program" "$@") || return
  before=$(isobath_progress "$output")

  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  if [[ -n $isobath_is_stopped ]]; then
    echo "slurm: stopped before the ranks of $config started; it is not queued again. Give it more time (--time)." >&2
    return 75
  fi
  mpirun -n "$SLURM_NTASKS" --map-by "slot:PE=$OMP_NUM_THREADS" "$program" run "$@" --resume-or-start &
  isobath_pid=$!
  # A trapped signal ends `wait` early; the status of the run is that of the last one.
  wait $isobath_pid
  status=$?
  while kill -0 $isobath_pid 2>/dev/null; do
    wait $isobath_pid
    status=$?
  done
  [[ $status -eq 75 ]] || return "$status"

  if [[ $(isobath_progress "$output") == "$before" ]]; then
    echo "slurm: stopped before $output had a finished stage or a saved state more than at the start of this job; it" \
      "is not queued again. Give it more time or nodes (--time, --nodes) and submit $config again." >&2
  else
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}
