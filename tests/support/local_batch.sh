#!/bin/sh
# A batch system of one machine: starts at once whatever is submitted, knows how it ended, kills it when asked.
#   local_batch.sh FOLDER submit WHAT-IS-ASKED-FOR JOBSCRIPT    prints the job's id
#   local_batch.sh FOLDER status JOB                            prints running, success or failed
#   local_batch.sh FOLDER cancel JOB...
set -eu
folder=$1 action=$2
shift 2
case $action in
  submit)
    job=$(mktemp -d "$folder/job.XXXXXX")
    echo "$1" >"$job/asked"
    # As on a cluster, a job starts neither in the folder nor in the session of who submits it.
    cd /
    setsid sh -c 'echo $$ >"$2/pid"; sh "$1"; echo $? >"$2/exit"' job "$2" "$job" >"$job/output" 2>&1 </dev/null &
    basename "$job" ;;
  status)
    job=$folder/$1
    if [ -s "$job/exit" ]; then
      if [ "$(cat "$job/exit")" = 0 ]; then echo success; else echo failed; fi
    elif [ ! -s "$job/pid" ] || kill -0 "$(cat "$job/pid")" 2>/dev/null; then
      echo running
    else
      echo failed
    fi ;;
  cancel)
    for job; do kill -s KILL -- "-$(cat "$folder/$job/pid")"; done ;;
esac
