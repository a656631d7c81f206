#!/bin/busybox sh
# The guest's first program: brings up the disk, runs the test's script, and powers off. Run a second time, on the disk
# as root, with the payload's directory as its argument.
PATH=/bin
export PATH

# The end of every guest: what the script wrote is made durable, and the file system is left clean.
end() {
    sync
    umount -a -r 2>/dev/null
    mount -o remount,ro / 2>/dev/null
    echo "@@exit $1"
    poweroff -f
}

if [ -z "$1" ]; then
    /bin/busybox --install -s /bin
    mount -t devtmpfs dev /dev
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    exec </dev/console >/dev/console 2>&1
    stty -echo
    while read -r module; do
        insmod "/modules/$module.ko" || echo "cannot insert $module"
    done </modules/order
    tries=0
    while [ ! -b /dev/vda ]; do
        tries=$((tries + 1))
        [ $tries -gt 300 ] && echo "no disk appeared" && end 125
        sleep 0.1
    done
    PAYLOAD=/payload
    if [ -e /payload/from-disk ]; then
        mount -t ext4 /dev/vda /mnt || end 124
        mount -t tmpfs run /mnt/run
        mount -t tmpfs tmp /mnt/tmp
        cp -r /payload /init /mnt/run/
        for dir in dev proc sys; do mount --move /$dir /mnt/$dir; done
        exec switch_root /mnt /bin/busybox sh /run/init /run/payload
    fi
else
    PAYLOAD=$1
    # The disk has busybox alone; its other names live in memory, so that starting a guest writes nothing to the disk.
    mkdir -p /run/bin
    /bin/busybox --install -s /run/bin
    PATH=/run/bin
fi

export PAYLOAD
(
    set -e
    . "$PAYLOAD/lib.sh"
    . "$PAYLOAD/script"
)
end $?
