#!/bin/sh
# Installs the units and their settings. Repeatable: settings that exist are kept, units are replaced.
set -eu

usage() {
    cat <<'USAGE'
Usage: install.sh [options]
  --ranks N            daemons on this host (default: one for each GPU)
  --cpu                no GPUs: needs --ranks
  --prefix DIR         environment that holds bin/shardd and bin/coordinator (default: /opt/tensor-parallel)
  --root DIR           install below DIR, for an image; touches no running system
 several hosts:
  --world-size N       ranks on all hosts (default: --ranks)
  --first-rank K       rank of this host's first daemon (default: 0)
  --listen-base H:P    daemon i listens on H:(P+i), not on a Unix socket
  --advertise HOST     this host's address, as peers reach it
  --shards LIST        every daemon in rank order, comma separated (for the host with the coordinator)
  --no-coordinator     daemons only
USAGE
}

fail() { echo "install.sh: $*" >&2; exit 2; }
need() { [ "$#" -ge 2 ] || fail "$1 needs a value"; }
number() { case $2 in '' | *[!0-9]*) fail "$1 must be a number, not '$2'" ;; esac }

here=$(cd "$(dirname "$0")" && pwd)
ranks='' device=cuda prefix=/opt/tensor-parallel root='' world_size='' first_rank=0
listen_base='' advertise='' shards='' coordinator=yes
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) device=cpu ;;
        --no-coordinator) coordinator=no ;;
        --ranks) need "$@"; number "$1" "$2"; ranks=$2; shift ;;
        --world-size) need "$@"; number "$1" "$2"; world_size=$2; shift ;;
        --first-rank) need "$@"; number "$1" "$2"; first_rank=$2; shift ;;
        --prefix) need "$@"; prefix=$2; shift ;;
        --root) need "$@"; root=${2%/}; shift ;;
        --listen-base) need "$@"; listen_base=$2; shift ;;
        --advertise) need "$@"; advertise=$2; shift ;;
        --shards) need "$@"; shards=$2; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown option $1" ;;
    esac
    shift
done

if [ -z "$ranks" ]; then
    [ "$device" = cuda ] || fail "--cpu needs --ranks"
    ranks=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)  # parts of a GPU (MIG) are listed below it
fi
[ "$ranks" -ge 1 ] || fail "no GPU found; use --ranks N, with --cpu where there is none"
: "${world_size:=$ranks}"
[ "$world_size" -ge $((first_rank + ranks)) ] ||
    fail "--world-size $world_size is less than --first-rank $first_rank plus $ranks ranks"
case $listen_base in
    '' | *:[0-9]*) ;;
    *) fail "--listen-base must be HOST:PORT, not '$listen_base'" ;;
esac
if [ -z "$shards" ]; then
    index=0
    while [ "$index" -lt "$ranks" ]; do
        if [ -n "$listen_base" ]; then
            address="${advertise:-${listen_base%:*}}:$((${listen_base##*:} + index))"
        else
            address="unix:/run/tensor-parallel/shardd-$index.sock"
        fi
        shards="$shards${shards:+,}$address"
        index=$((index + 1))
    done
    [ "$world_size" -eq "$ranks" ] || [ "$coordinator" = no ] ||
        fail "with ranks on other hosts, --shards must list every daemon (or use --no-coordinator here)"
fi
for program in shardd coordinator; do
    [ -x "$root$prefix/bin/$program" ] || fail "$root$prefix/bin/$program is missing: install the package there first"
done

if [ -z "$root" ]; then
    for path in "$prefix" "$(readlink -f "$prefix/bin/python3" || true)"; do
        case $path in
            /home/* | /root/* | /run/user/*) fail "$path: the units cannot see home directories; install below /opt" ;;
        esac
    done
fi

units=$root/usr/lib/systemd/system
settings=$root/etc/tensor-parallel
install -d -m 0755 "$units" "$root/usr/lib/sysusers.d" "$root/usr/lib/tmpfiles.d" "$settings" "$root/opt"
if [ "$prefix" != /opt/tensor-parallel ]; then
    [ -L "$root/opt/tensor-parallel" ] || [ ! -e "$root/opt/tensor-parallel" ] ||
        fail "$root/opt/tensor-parallel exists and is not a link: move it away, or install from it without --prefix"
    ln -sfn "$prefix" "$root/opt/tensor-parallel"
fi
install -m 0644 "$here/shardd@.service" "$here/coordinator.service" "$here/tensor-parallel.target" "$units/"
install -m 0644 "$here/sysusers.conf" "$root/usr/lib/sysusers.d/tensor-parallel.conf"
install -m 0644 "$here/tmpfiles.conf" "$root/usr/lib/tmpfiles.d/tensor-parallel.conf"
if [ -f "$here/../README.md" ]; then
    install -D -m 0644 "$here/../README.md" "$root/usr/share/doc/tensor-parallel/README.md"
fi
version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
if [ "${version:-0}" -ge 254 ]; then
    install -D -m 0644 "$here/backoff.conf" "$units/shardd@.service.d/backoff.conf"
    install -D -m 0644 "$here/backoff.conf" "$units/coordinator.service.d/backoff.conf"
fi

# Writes standard input to a settings file, unless there is one.
setting() {
    if [ -e "$settings/$1" ]; then
        cat > /dev/null
        echo "kept $settings/$1"
    else
        cat > "$settings/$1"
        chmod 0644 "$settings/$1"
    fi
}

sed -e "s|@WORLD_SIZE@|$world_size|" -e "s|@DEVICE@|$device|" -e "s|@SHARDS@|$shards|" \
    "$here/tensor-parallel.env" | setting tensor-parallel.env
index=0
while [ "$index" -lt "$ranks" ]; do
    {
        echo "# Settings of daemon $index of this host alone."
        echo "SHARDD_RANK=$((first_rank + index))"
        echo "SHARDD_METRICS_LISTEN=127.0.0.1:$((9200 + index))"
        if [ "$device" = cuda ] && [ -z "$root" ]; then
            uuid=$(nvidia-smi --id="$index" --query-gpu=uuid --format=csv,noheader 2>/dev/null || true)
            if [ -n "$uuid" ]; then
                echo "# The daemon refuses to start on any other GPU. Remove this line when the card is replaced."
                echo "SHARDD_GPU_UUID=$uuid"
            fi
        fi
        [ -z "$listen_base" ] || echo "SHARDD_LISTEN=${listen_base%:*}:$((${listen_base##*:} + index))"
        [ -z "$advertise" ] || echo "SHARDD_ADVERTISE=$advertise"
    } | setting "shardd-$index.env"
    set -- "$@" "shardd@$index.service"
    index=$((index + 1))
done
[ "$coordinator" = no ] || set -- "$@" coordinator.service

if [ -n "$root" ]; then
    systemctl --root="$root" --quiet enable tensor-parallel.target "$@"
    echo "installed below $root; accounts and directories are made at its next boot"
else
    systemd-sysusers tensor-parallel.conf
    systemd-tmpfiles --create tensor-parallel.conf
    systemctl daemon-reload
    systemctl --quiet enable tensor-parallel.target "$@"
    echo "installed; start it with: systemctl start tensor-parallel.target"
fi
