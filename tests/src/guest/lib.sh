# Helpers for the scripts that tests run in a guest. Sourced by the script's shell; PAYLOAD is its directory.

# report KEY VALUE…: tells the test.
report() { echo "@@$*"; }

# mount_disk DIR: mounts the disk there.
mount_disk() { mkdir -p "$1" && mount -t ext4 /dev/vda "$1"; }

# verify DIR: checks the master's files below DIR against the checksums the test gave, and reports how many are
# right. Fails if one is not.
verify() {
    (cd "$1" && sha256sum -c "$PAYLOAD/manifest") >/tmp/verified 2>/tmp/complaints || cat /tmp/complaints
    sed '/: OK$/d' /tmp/verified
    right=$(sed -n '/: OK$/p' /tmp/verified | wc -l)
    report verified "$right"
    [ "$right" = "$(wc -l <"$PAYLOAD/manifest")" ]
}
