#!/bin/sh
# Stops the service and removes what install.sh put in place. Models and the package itself stay.
#   --root DIR   as given to install.sh
#   --purge      also settings, the list of models to serve, and the account
set -eu

root='' purge=no
while [ $# -gt 0 ]; do
    case $1 in
        --root) [ $# -ge 2 ] || { echo "uninstall.sh: --root needs a value" >&2; exit 2; }; root=${2%/}; shift ;;
        --purge) purge=yes ;;
        *) echo "uninstall.sh: unknown option $1" >&2; exit 2 ;;
    esac
    shift
done

if [ -z "$root" ]; then
    systemctl stop tensor-parallel.target coordinator.service 'shardd@*.service' || true
fi
rm -rf "$root/etc/systemd/system/tensor-parallel.target.wants" \
    "$root/usr/lib/systemd/system/shardd@.service.d/backoff.conf" \
    "$root/usr/lib/systemd/system/coordinator.service.d/backoff.conf" \
    "$root/run/tensor-parallel" "$root/usr/share/doc/tensor-parallel"
rmdir "$root/usr/lib/systemd/system/shardd@.service.d" "$root/usr/lib/systemd/system/coordinator.service.d" \
    2>/dev/null || true
rm -f "$root/etc/systemd/system/multi-user.target.wants/tensor-parallel.target" \
    "$root/usr/lib/systemd/system/shardd@.service" \
    "$root/usr/lib/systemd/system/coordinator.service" \
    "$root/usr/lib/systemd/system/tensor-parallel.target" \
    "$root/usr/lib/sysusers.d/tensor-parallel.conf" \
    "$root/usr/lib/tmpfiles.d/tensor-parallel.conf"
if [ -L "$root/opt/tensor-parallel" ]; then rm -f "$root/opt/tensor-parallel"; fi
if [ "$purge" = yes ]; then
    rm -rf "$root/etc/tensor-parallel" "$root/var/lib/tensor-parallel/coordinator"
fi
if [ -z "$root" ]; then
    systemctl daemon-reload
    systemctl reset-failed 'shardd@*.service' coordinator.service 2>/dev/null || true
    if [ "$purge" = yes ] && getent passwd tensor-parallel >/dev/null; then userdel tensor-parallel; fi
fi
