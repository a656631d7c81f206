//! A server under test, on a shard of its own.

use crate::disk::{Gated, over};
use disk::Disk;
use headwater_export::vhost_user::{VhostUserExport, VhostUserServer};
use ring::{Config, Shard};
use std::cell::RefCell;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// What lives on the shard.
pub(crate) struct Inside {
    pub(crate) server: VhostUserServer,
    pub(crate) store: Rc<Gated>,
    pub(crate) disk: Rc<Disk>,
}

thread_local! {
    static INSIDE: RefCell<Option<Rc<Inside>>> = const { RefCell::new(None) };
}

/// How to start it.
#[derive(Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) size: u64,
    pub(crate) queues: u16,
    pub(crate) read_only: bool,
    pub(crate) write_through: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { size: 1 << 20, queues: 2, read_only: false, write_through: false }
    }
}

pub(crate) struct Server {
    shard: Shard,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start(setup: Setup) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vhost.sock");
        let shard = Shard::start("test", Config::default()).unwrap();
        let socket = path.clone();
        let start = move || async move {
            let store = Gated::new(setup.size);
            let disk = over(&store, false);
            let server = VhostUserServer::start(VhostUserExport {
                socket,
                disk: Rc::clone(&disk),
                read_only: setup.read_only,
                write_through: setup.write_through,
                queues: setup.queues,
                serial: "serial-of-the-disk".into(),
            })
            .await
            .unwrap();
            INSIDE.with(|inside| *inside.borrow_mut() = Some(Rc::new(Inside { server, store, disk })));
        };
        shard.handle().call(start).wait().unwrap();
        Self { shard, path, _dir: dir }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs something on the shard, without waiting for its end.
    pub(crate) fn spawn<T: Send + 'static, F: Future<Output = T> + 'static>(
        &self,
        work: impl FnOnce(Rc<Inside>) -> F + Send + 'static,
    ) -> ring::Reply<T> {
        self.shard.handle().call(move || work(INSIDE.with(|inside| Rc::clone(inside.borrow().as_ref().unwrap()))))
    }

    /// Runs something on the shard.
    pub(crate) fn on<T: Send + 'static>(&self, work: impl FnOnce(&Inside) -> T + Send + 'static) -> T {
        self.spawn(|inside| async move { work(&inside) }).wait().unwrap()
    }

    /// Waits until `count` requests wait before the gate.
    pub(crate) fn wait_held(&self, count: usize) {
        crate::driver::eventually("requests to be held", || self.on(|inside| inside.store.waiting()) == count);
    }

    pub(crate) fn stop(self) {
        self.on(|inside| inside.store.open_gate());
        self.spawn(|inside| async move { inside.server.stop().await }).wait().unwrap();
        assert!(!self.path.exists(), "the socket is removed");
        self.forget();
    }

    /// Lets go of what is on the shard and ends it.
    fn forget(self) {
        self.shard.handle().call(|| async { drop(INSIDE.with(|inside| inside.borrow_mut().take())) }).wait().unwrap();
        self.shard.stop();
    }
}
