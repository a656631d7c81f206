//! Which nodes jobs are at work on: no node is in two jobs at a time.

use super::Graph;
use image::{Error, ErrorKind, Result};
use std::cell::RefCell;
use std::rc::{Rc, Weak};

/// What a commit calls itself.
pub(super) const COMMIT: &str = "commit";

/// A job has the node of this name.
pub(super) fn busy(node: &str, job: &str) -> Error {
    let what = format!("Node '{node}' is busy: block device is in use by block job: {job}");
    Error::new(ErrorKind::Busy, "", None, what)
}

/// What one job works on.
pub(super) struct Work {
    number: u64,
    kind: &'static str,
    /// The node that QEMU would put on top of the others for as long as the job is there; here it is a name only.
    filter: String,
    /// From the top down.
    nodes: Vec<String>,
}

/// A job's nodes are its own until this is dropped.
pub struct Busy {
    number: u64,
    jobs: Weak<RefCell<Vec<Work>>>,
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(jobs) = self.jobs.upgrade() {
            jobs.borrow_mut().retain(|work| work.number != self.number);
        }
    }
}

impl Graph {
    /// The kind of job that has taken this node.
    pub(super) fn occupied(&self, name: &str) -> Option<&'static str> {
        let jobs = self.jobs.borrow();
        jobs.iter().find(|work| work.nodes.iter().any(|node| node == name)).map(|work| work.kind)
    }

    /// Whether a commit has taken this node: it may be written to, or taken away, below whoever looks through it.
    pub(super) fn is_committed(&self, name: &str) -> bool {
        self.occupied(name) == Some(COMMIT)
    }

    /// Refuses a node that a job has taken.
    pub(super) fn check_free(&self, name: &str) -> Result<()> {
        self.occupied(name).map_or(Ok(()), |kind| Err(busy(name, kind)))
    }

    /// Takes `nodes`, which lie below each other, for a job of this kind; `filter` is what errors call the place above them.
    ///
    /// # Errors
    /// One of them is another job's.
    pub fn occupy(&self, kind: &'static str, filter: Option<String>, nodes: Vec<String>) -> Result<Busy> {
        let mut jobs = self.jobs.borrow_mut();
        for (depth, node) in nodes.iter().enumerate() {
            let Some(work) = jobs.iter().find(|work| work.nodes.contains(node)) else { continue };
            // From above one would come through the filter first.
            let met = if depth > 0 && work.nodes.first() == Some(node) { &work.filter } else { node };
            return Err(busy(met, work.kind));
        }
        let number = jobs.last().map_or(0, |work| work.number + 1);
        let filter = filter.unwrap_or_else(disk::chain::new_node_name);
        jobs.push(Work { number, kind, filter, nodes });
        Ok(Busy { number, jobs: Rc::downgrade(&self.jobs) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Objects;

    fn names(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn no_node_is_in_two_jobs() {
        let graph = Graph::new(Rc::new(Objects::default()));
        let first = graph.occupy("stream", Some("filter".into()), names("d c b")).unwrap();
        let refused = |nodes: &str| graph.occupy("stream", None, names(nodes)).map(drop).unwrap_err().to_string();
        assert_eq!(refused("e d c"), "Node 'filter' is busy: block device is in use by block job: stream");
        assert_eq!(refused("d c"), "Node 'd' is busy: block device is in use by block job: stream");
        assert_eq!(refused("c"), "Node 'c' is busy: block device is in use by block job: stream");
        let second = graph.occupy("stream", None, names("f e")).unwrap();
        drop(first);
        drop(graph.occupy("stream", None, names("c b a")).unwrap());
        drop(second);
        graph.occupy("stream", None, names("f e d c")).unwrap();
    }
}
