#!/bin/sh
# What Snakemake asks about a job of PBS Pro or OpenPBS: prints running, success or failed.
# Without it a job that qdel or the time limit killed would be waited for forever.
if ! shown=$(qstat -x -f "$1" 2>/dev/null); then
  # The server may be busy; a job that it does not remember any more has been gone for days.
  echo running
  exit
fi
value() { printf '%s\n' "$shown" | sed -n "s/^ *$1 = //p"; }
case "$(value job_state)" in
  F) if [ "$(value Exit_status)" = 0 ]; then echo success; else echo failed; fi ;;
  *) echo running ;;
esac
