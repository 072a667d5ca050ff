#!/bin/sh
# A member: member.sh key NAME | train NAME MODEL JOIN DATA | export NAME
set -eu

splitfl=${SPLITFL:-splitfl}
case $1 in
key) $splitfl keygen "$2.key" --name "$2" ;;
train)
    $splitfl doctor "$4" --identity "$2.key" --model "$3"
    $splitfl train --trunk "$4" --identity "$2.key" --model "$3" --data "$5" --out "runs/$2" --steps "${STEPS:-100}"
    ;;
export) $splitfl export "runs/$2" "$2-adapter" ;;
*)
    echo "member.sh key NAME | train NAME MODEL JOIN DATA | export NAME" >&2
    exit 2
    ;;
esac
