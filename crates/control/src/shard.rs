//! What lives on one shard: devices, their jobs, their exports. Reached only by closures that run there.

use crate::exports::Export;
use crate::lent::Lent;
use crate::{DiskSpec, Failure, Happening};
use disk::chain::{ChainOptions, FileOpener, Opened, Opener, open_chain};
use disk::{Disk, DiskOptions};
use export::nbd::{Address, NbdExport, NbdServer};
use export::vhost_user::{VhostUserExport, VhostUserServer};
use futures_util::future::LocalBoxFuture;
use graph::{Graph, Objects, Sources};
use job::{Events, Jobs};
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use store::Store;
use store::ailing::{AilingStore, Ailments};
use store::file::OpenOptions;

thread_local! {
    static STATE: RefCell<Option<Rc<ShardState>>> = const { RefCell::new(None) };
}

/// A disk as operators know it.
pub struct Device {
    /// What was asked for.
    pub spec: DiskSpec,
    /// The disk.
    pub disk: Rc<Disk>,
}

/// One shard's devices, jobs and exports.
pub struct ShardState {
    devices: RefCell<Vec<Rc<Device>>>,
    jobs: Rc<Jobs>,
    objects: Rc<Objects>,
    graph: Graph,
    happened: Rc<dyn Fn(Happening)>,
    pub(crate) exports: RefCell<Vec<Export>>,
    pub(crate) nbd_server: RefCell<Option<Rc<NbdServer>>>,
    pub(crate) lent: RefCell<Vec<Lent>>,
    nbd: RefCell<Vec<Rc<NbdServer>>>,
    vhost_user: RefCell<Vec<(String, Rc<VhostUserServer>)>>,
}

impl ShardState {
    /// Sets this thread's state up; once, before anything else runs here.
    pub(crate) fn install(happened: Rc<dyn Fn(Happening)>, objects: &[String]) {
        // They were looked at before any shard was started.
        let objects = Rc::new(Objects::new(objects).unwrap_or_default());
        let told = Rc::clone(&happened);
        let events: Events = Rc::new(move |event| told(Happening::Job(event)));
        STATE.with(|state| {
            *state.borrow_mut() = Some(Rc::new(Self {
                devices: RefCell::default(),
                jobs: Jobs::new(events),
                graph: Graph::new(Rc::clone(&objects)),
                objects,
                happened,
                exports: RefCell::default(),
                nbd_server: RefCell::default(),
                lent: RefCell::default(),
                nbd: RefCell::default(),
                vhost_user: RefCell::default(),
            }));
        });
    }

    /// This thread's state; `None` off the shards, and after shutdown.
    pub(crate) fn current() -> Option<Rc<Self>> {
        STATE.with(|state| state.borrow().clone())
    }

    /// Devices, in the order they came.
    pub fn devices(&self) -> Vec<Rc<Device>> {
        self.devices.borrow().clone()
    }

    /// A device by its name.
    pub fn device(&self, name: &str) -> Option<Rc<Device>> {
        self.devices.borrow().iter().find(|device| device.spec.name == name).cloned()
    }

    /// The named nodes of this shard.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    pub(crate) fn tell(&self, happening: Happening) {
        (self.happened)(happening);
    }

    /// The jobs of this shard's devices.
    pub fn jobs(&self) -> &Rc<Jobs> {
        &self.jobs
    }

    /// Opens a chain and puts a disk over it.
    pub(crate) async fn add_disk(&self, spec: DiskSpec) -> Result<Rc<Device>, Failure> {
        let files = FileOpener {
            top: OpenOptions {
                read_only: spec.read_only,
                direct: spec.cache.direct(),
                no_flush: spec.cache == crate::CacheMode::Unsafe,
                ..OpenOptions::default()
            },
            below: OpenOptions { read_only: true, direct: spec.cache.direct(), ..OpenOptions::default() },
        };
        let sources = Sources::new(files, Rc::clone(&self.objects));
        let opener = Ailing { sources, ailments: spec.source.clone() };
        let options = ChainOptions {
            format: spec.format,
            read_only: spec.read_only,
            snapshot: spec.snapshot.clone(),
            ..ChainOptions::default()
        };
        let chain = open_chain(&opener, &spec.file, options).await?;
        let disk = Disk::new(
            &spec.name,
            chain,
            DiskOptions { copy_on_read: spec.copy_on_read, write_through: spec.cache.write_through(), discard: true },
        );
        let device = Rc::new(Device { spec, disk });
        self.devices.borrow_mut().push(device.clone());
        Ok(device)
    }

    /// Offers `names` (all on this shard) at one NBD address, to `most` clients at once (0: any number); returns the address in use.
    pub(crate) async fn start_nbd(&self, address: Address, names: &[String], most: u32) -> Result<Address, Failure> {
        let mut exports = Vec::new();
        for name in names {
            let device = self.device(name).ok_or_else(|| Failure::no_device(name))?;
            exports.push(NbdExport {
                name: name.clone(),
                description: device.spec.description.clone(),
                disk: device.disk.clone(),
                read_only: device.spec.read_only,
                // The disk is written through by itself, where that was asked for.
                write_through: false,
            });
        }
        let server = NbdServer::start(address, exports).await?;
        server.limit_clients(most);
        let address = server.address().clone();
        self.nbd.borrow_mut().push(Rc::new(server));
        Ok(address)
    }

    /// Ends when clients have come to every NBD server here, and none is left.
    pub async fn clients_left(&self) {
        let servers: Vec<Rc<NbdServer>> = self.nbd.borrow().iter().map(Rc::clone).collect();
        for server in servers {
            server.left().await;
        }
    }

    /// Offers a device to a vhost-user front end.
    pub(crate) async fn start_vhost_user(&self, name: &str, socket: PathBuf, queues: u16) -> Result<(), Failure> {
        let device = self.device(name).ok_or_else(|| Failure::no_device(name))?;
        let serial = name.chars().filter(char::is_ascii).take(20).collect();
        let export = VhostUserExport {
            socket,
            disk: device.disk.clone(),
            read_only: device.spec.read_only,
            write_through: false,
            queues,
            serial,
        };
        let server = VhostUserServer::start(export).await?;
        self.vhost_user.borrow_mut().push((name.to_owned(), Rc::new(server)));
        Ok(())
    }

    /// A device's disk has another size: guests hear of it.
    pub(crate) fn announce_device_size(&self, disk: &Rc<Disk>) {
        for (name, server) in self.vhost_user.borrow().iter() {
            if self.device(name).is_some_and(|device| Rc::ptr_eq(&device.disk, disk)) {
                server.resized();
            }
        }
    }

    /// Ends exports, then jobs, then disks: no guest request and no job is in flight when a disk closes. The first failure
    /// is reported, the rest is closed all the same.
    pub(crate) async fn shut_down(&self) -> Result<(), Failure> {
        self.end_exports().await;
        self.end_lent().await;
        let servers = std::mem::take(&mut *self.nbd.borrow_mut());
        for server in servers {
            server.stop().await;
        }
        let servers = std::mem::take(&mut *self.vhost_user.borrow_mut());
        for (_, server) in servers {
            server.stop().await;
        }
        self.jobs.shut_down().await;
        let devices = std::mem::take(&mut *self.devices.borrow_mut());
        let mut outcome = Ok(());
        for device in devices {
            if let Err(error) = device.disk.close().await {
                outcome = outcome.and(Err(Failure::from(error)));
            }
        }
        outcome = outcome.and(self.graph.close_all().await.map_err(Failure::from));
        outcome
    }
}

/// Whatever names stand for; what lies below the top may be ailing, if that is asked for.
struct Ailing {
    sources: Sources,
    ailments: Ailments,
}

impl Opener for Ailing {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: Option<&'a str>,
        read_only: bool,
    ) -> LocalBoxFuture<'a, disk::Result<Opened>> {
        Box::pin(async move {
            let mut opened = self.sources.open(name, referrer, read_only).await?;
            if referrer.is_some() && self.ailments != Ailments::default() {
                opened.store = AilingStore::new(opened.store, self.ailments.clone());
            }
            Ok(opened)
        })
    }

    fn companion<'a>(
        &'a self,
        name: &'a str,
        referrer: &'a str,
        read_only: bool,
    ) -> LocalBoxFuture<'a, disk::Result<Rc<dyn Store>>> {
        self.sources.companion(name, referrer, read_only)
    }

    fn identify(&self, name: &str, referrer: Option<&str>) -> String {
        self.sources.identify(name, referrer)
    }
}
