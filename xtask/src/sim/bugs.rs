//! Known bugs: each a change to the text of the product, small enough that somebody could make it.
//!
//! An edit names a text that occurs exactly once in its file; a test sees to it that this stays so.

/// A text, and what stands there instead.
pub(super) struct Edit {
    pub(super) file: &'static str,
    pub(super) old: &'static str,
    pub(super) new: &'static str,
}

/// One bug.
pub(super) struct Bug {
    pub(super) name: &'static str,
    pub(super) edits: &'static [Edit],
}

const fn edit(file: &'static str, old: &'static str, new: &'static str) -> Edit {
    Edit { file, old, new }
}

const COMMIT: &str = "crates/image/src/qed/commit.rs";
const HEADER: &str = "crates/image/src/qed/header.rs";
const QCOW2_COMMIT: &str = "crates/image/src/qcow2/commit.rs";
const REFCOUNT: &str = "crates/image/src/qcow2/refcount.rs";
const SPACE: &str = "crates/image/src/space.rs";
const HEALTH: &str = "crates/image/src/health.rs";

/// All of them.
pub(super) const BUGS: &[Bug] = &[
    Bug {
        name: "a mapping is published before its data is durable",
        edits: &[edit(COMMIT, "if epoch.barrier_due {", "if epoch.barrier_due && epoch.slices.is_empty() {")],
    },
    Bug {
        name: "a table's pointer is written without a barrier after the table",
        edits: &[edit(
            COMMIT,
            "        self.health.barrier().await?;\n        if epoch.tables.is_empty() {\n            return Ok(());\n        }\n",
            "        if epoch.tables.is_empty() {\n            return self.health.barrier().await;\n        }\n",
        )],
    },
    Bug {
        name: "the last barrier of a commit is left out",
        edits: &[edit(
            COMMIT,
            "self.health.write_all(entries).await?;\n        self.health.barrier().await\n",
            "self.health.write_all(entries).await\n",
        )],
    },
    Bug {
        name: "at a stream's end the header comes before the tables",
        edits: &[
            edit(
                "crates/disk/src/stream.rs",
                "        self.check_nothing_missing(&view, above).await?;\n        self.commit().await?;\n",
                "        self.check_nothing_missing(&view, above).await?;\n",
            ),
            edit(
                HEADER,
                "            check_backing(self.store.name(), backing)?;\n        }\n        self.commit().await?;\n",
                "            check_backing(self.store.name(), backing)?;\n        }\n",
            ),
        ],
    },
    Bug {
        name: "a stream's end is told before the header is durable",
        edits: &[edit(
            HEADER,
            "        self.publish_header(&mut zone, header).await?;\n        *self.backing.borrow_mut() = backing;\n",
            "        self.write_header(&mut zone, header).await?;\n        *self.backing.borrow_mut() = backing;\n",
        )],
    },
    Bug {
        name: "need-check is set, but not durably",
        edits: &[edit(
            HEADER,
            "            core.publish_header(&mut zone, header).await?;\n            core.marked.set(true);\n",
            "            core.write_header(&mut zone, header).await?;\n            core.marked.set(true);\n",
        )],
    },
    Bug {
        name: "need-check is cleared while reservations are out",
        edits: &[edit(
            HEADER,
            "if !self.marked.get() || self.active.get() > 0 || self.is_dirty() {",
            "if !self.marked.get() {",
        )],
    },
    Bug {
        name: "a discard lets the backing file show through",
        edits: &[edit(
            "crates/disk/src/zero.rs",
            "[(masked, true), (unmasked, false)]",
            "[(masked, false), (unmasked, false)]",
        )],
    },
    Bug {
        name: "copying overwrites what a guest has written meanwhile",
        edits: &[edit(
            "crates/disk/src/populate.rs",
            "reservation.link(Keep::Unallocated, veto);",
            "reservation.link(Keep::New, veto);",
        )],
    },
    Bug {
        name: "a write that allocates does not hold its clusters exclusively",
        edits: &[edit(
            "crates/disk/src/write.rs",
            "let _held = self.locks.exclusive(range.align_outward(self.unit)).await;\n        self.write_held",
            "let _held = self.locks.shared(range.align_outward(self.unit)).await;\n        self.write_held",
        )],
    },
    Bug {
        name: "a cluster is handed out twice",
        edits: &[edit(
            SPACE,
            "            let taken = want.min(len);\n            self.free.remove(&at);\n",
            "            let taken = want.min(len);\n            if taken < len {\n                self.free.remove(&at);\n            }\n",
        )],
    },
    Bug {
        name: "a replaced cluster is used again before the table that let go of it is durable",
        // A cluster is replaced only where copying links what a guest is writing, which does no harm by itself.
        edits: &[
            edit(SPACE, "        self.unlinked.push(range);\n", "        self.give_back(range);\n"),
            edit(
                "crates/disk/src/populate.rs",
                "reservation.link(Keep::Unallocated, veto);",
                "reservation.link(Keep::Unallocated, |_| false);",
            ),
            edit("crates/disk/src/populate.rs", "Ok(if taken || veto(cluster.start()) {", "Ok(if taken {"),
        ],
    },
    Bug {
        name: "a failed barrier is taken for a good one",
        edits: &[edit(
            HEALTH,
            "        self.store.flush().await.map_err(|e| self.fail(e.into()))\n",
            "        let _ = self.store.flush().await;\n        Ok(())\n",
        )],
    },
    Bug {
        name: "a commit serves those who came after its copies were taken",
        edits: &[
            edit(
                "crates/image/src/commits.rs",
                "Ok(()) => state.served = upto,",
                "Ok(()) => state.served = state.tickets,",
            ),
            edit(
                "crates/disk/src/flush.rs",
                "        let round = Rc::clone(flusher.next.borrow_mut().get_or_insert_default());\n        if !flusher.running.replace(true) {\n            drop(ring::spawn(Rc::clone(self).run_commits()));\n        }\n        round.result().await\n",
                "        let result = self.top.commit().await;\n        if result.is_ok() {\n            flusher.durable.set(flusher.changes.get());\n        }\n        result\n",
            ),
        ],
    },
    Bug {
        name: "a write in place with FUA is only written",
        edits: &[edit(
            "crates/disk/src/write.rs",
            "self.write_store(host, from, through).await?;",
            "self.write_store(host, from, false).await?;",
        )],
    },
    Bug {
        name: "what surrounds a small write in a new cluster is not fetched",
        edits: &[edit(
            "crates/disk/src/write.rs",
            "if on_disk.is_empty() || mapping == Mapping::Zero || nothing_below {",
            "if on_disk.len() < 4096 || mapping == Mapping::Zero || nothing_below {",
        )],
    },
    Bug {
        name: "a layer is read past its end",
        edits: &[edit(
            "crates/disk/src/view.rs",
            "return Ok(Run { len: range.len(), found: Found::PastEnd(layer) });",
            "continue;",
        )],
    },
    Bug {
        name: "a disk that grows shows what a longer backing file holds there",
        edits: &[edit("crates/disk/src/resize.rs", "if !shows.is_empty() {", "if shows.len() > 1 << 40 {")],
    },
    Bug {
        name: "an ignored error lets the backing file go",
        edits: &[edit(
            "crates/job/src/copy.rs",
            "return self.ignored.map_or(Ok(()), |error| Err(Stopped::Failed(error)));",
            "return Ok(());",
        )],
    },
    Bug {
        name: "progress runs past the end",
        edits: &[edit(
            "crates/job/src/progress.rs",
            "if self.passed { self.missing } else { self.copied.min(self.missing) }",
            "if self.passed { self.missing } else { self.copied + self.copied }",
        )],
    },
    Bug {
        name: "a failed write of a table does not poison",
        edits: &[edit(
            HEALTH,
            "self.store.write(at, bytes, false).await.map_err(|e| self.fail(e.into()))",
            "self.store.write(at, bytes, false).await.map_err(Into::into)",
        )],
    },
    Bug {
        name: "QCOW2: a mapping is published before its data and refcounts are durable",
        edits: &[edit(
            QCOW2_COMMIT,
            "        self.write_refcounts(zone).await?;\n        self.data_barrier().await?;\n",
            "        self.write_refcounts(zone).await?;\n",
        )],
    },
    Bug {
        name: "QCOW2: what lies behind the end of the file is taken for free, though it is counted",
        edits: &[edit(
            REFCOUNT,
            "let end = if growable { end } else { clusters };",
            "let end = if growable { end.min(clusters) } else { clusters };",
        )],
    },
    Bug {
        name: "QCOW2: a replaced cluster is free before the table that let go of it is durable",
        edits: &[edit(
            "crates/image/src/qcow2/allocate.rs",
            "core.room.space.borrow_mut().unlink(L2Entry::referred(current.0, &header));",
            "core.room.space.borrow_mut().give_back(L2Entry::referred(current.0, &header));",
        )],
    },
    Bug {
        name: "QCOW2: what was linked is not counted",
        edits: &[edit(
            QCOW2_COMMIT,
            "self.count_up(std::mem::take(&mut epoch.linked)).await;",
            "self.count_up(Vec::new()).await;",
        )],
    },
    Bug {
        name: "QCOW2: a table that a snapshot refers to is changed where it is",
        edits: &[edit(
            "crates/image/src/qcow2/resolve.rs",
            "Ok(L1Entry::Table(at)) => Ok(Table::Stored { at, own: is_own(raw) }),",
            "Ok(L1Entry::Table(at)) => Ok(Table::Stored { at, own: is_own(raw) || raw > 0 }),",
        )],
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn every_bug_can_be_planted() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for bug in BUGS {
            for Edit { file, old, new } in bug.edits {
                let text = std::fs::read_to_string(root.join(file)).unwrap();
                assert_eq!(text.matches(old).count(), 1, "{}: {old:?} in {file}", bug.name);
                assert_ne!(old, new);
            }
        }
    }
}
