#!/bin/sh
# The operator: operator.sh MODEL PUBLIC_KEY_FILE... lists the members' keys and serves the trunk to them.
set -eu

model=$1
shift
cat "$@" > authorized_clients
exec ${SPLITFL:-splitfl} serve "$model" --run two --clients "$#" --authorized-clients authorized_clients \
    --bind "${ADDRESS:-0.0.0.0:7100}" --data-port "${DATA_PORT:-7101}" --lr 1e-3 --steps "${STEPS:-100}" --until-done
