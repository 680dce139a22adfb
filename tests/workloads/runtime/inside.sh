#!/bin/sh
# Runs a command in a root of its own, as containers do: the system's files read-only, /work from here, /proc of its PID
# namespace, and a /tmp that nobody else sees. Usage: inside.sh ROOT WORK COMMAND...; to be started by
# `unshare --mount --pid --fork`, so that the command becomes PID 1.
set -e
root=$1
work=$2
shift 2
mount -t tmpfs root "$root"
for folder in usr etc dev bin sbin lib lib64; do
  if [ -L "/$folder" ]; then
    cp -P "/$folder" "$root/$folder"
  elif [ -d "/$folder" ]; then
    mkdir "$root/$folder"
    mount --rbind "/$folder" "$root/$folder"
    mount -o remount,bind,ro "$root/$folder"
  fi
done
mkdir "$root/proc" "$root/tmp" "$root/work" "$root/old"
mount --bind "$work" "$root/work"
mount -o remount,bind,ro "$root/work"
mount -t proc proc "$root/proc"
mount -t tmpfs tmp "$root/tmp"
cd "$root"
pivot_root . old
umount -l old
cd /tmp
exec "$@"
