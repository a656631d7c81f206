//! The files of a descriptor's extents: which names are followed, and what they are joined to.

use super::File;
use crate::{Companions, Error, ErrorKind, Result};
use std::collections::HashMap;
use std::path::{Component, Path};
use std::rc::Rc;
use store::Store;
use store::joined::JoinedStore;

/// Files that were opened; whoever takes none of them over closes them.
#[derive(Default)]
pub(super) struct Files {
    stores: Vec<Rc<dyn Store>>,
    /// By name: one file may hold several extents.
    numbers: HashMap<String, usize>,
}

impl Files {
    /// Opens the file of an extent of the image `referrer`; returns its number.
    pub(super) async fn open(&mut self, companions: &dyn Companions, name: &str, referrer: &str) -> Result<usize> {
        let name = local(name).map_err(|why| {
            let what = format!(
                "its extent '{name}' {why}: extents are looked for in the image's own folder only; put it there, and write its \
                 plain name into the descriptor"
            );
            Error::new(ErrorKind::Unsupported, referrer, None, what)
        })?;
        if let Some(number) = self.numbers.get(&name) {
            return Ok(*number);
        }
        let store = companions.open(&name, referrer, true).await.map_err(|error| {
            Error::new(ErrorKind::Chain, referrer, None, format!("could not open its extent '{name}'")).because(error)
        })?;
        self.stores.push(store);
        self.numbers.insert(name, self.stores.len() - 1);
        Ok(self.stores.len() - 1)
    }

    /// Joins `descriptor` and the files to one store; also says where each of the files is in it.
    pub(super) fn join(&self, descriptor: &Rc<dyn Store>) -> Result<(Rc<dyn Store>, Vec<File>)> {
        let stores = std::iter::once(descriptor).chain(&self.stores).cloned().collect();
        let joined = JoinedStore::new(descriptor.name(), stores)?;
        let files = self
            .stores
            .iter()
            .enumerate()
            .map(|(number, store)| File { store: Rc::clone(store), base: joined.place(number + 1).start() });
        let files = files.collect();
        Ok((joined, files))
    }

    /// Gives the files up.
    pub(super) async fn close(self) {
        for store in self.stores {
            let _ = store.close().await;
        }
    }
}

/// The name of a file in the image's folder or below it, so that it cannot be taken for anything else; or why it is not one.
fn local(name: &str) -> std::result::Result<String, &'static str> {
    // VMware on Windows separates folders its own way.
    let name = if name.contains('/') { name.to_owned() } else { name.replace('\\', "/") };
    if name.is_empty() || name.contains('\0') {
        return Err("is no name of a file");
    }
    let parts = Path::new(&name).components();
    if parts.into_iter().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err("lies in another folder");
    }
    // What comes before a colon must not be taken for a protocol.
    Ok(if name.contains(':') && !name.starts_with("./") { format!("./{name}") } else { name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_lead_out_of_the_folder() {
        assert_eq!(local("a.vmdk").as_deref(), Ok("a.vmdk"));
        assert_eq!(local("./a.vmdk").as_deref(), Ok("./a.vmdk"));
        assert_eq!(local("sub/a b.vmdk").as_deref(), Ok("sub/a b.vmdk"));
        assert_eq!(local("sub\\a.vmdk").as_deref(), Ok("sub/a.vmdk"));
        assert_eq!(local("nbd:host").as_deref(), Ok("./nbd:host"));
        for bad in ["", "/etc/shadow", "../a.vmdk", "sub/../../a.vmdk", "\\\\.\\PhysicalDrive0", "a\0b", "..\\a.vmdk"] {
            assert!(local(bad).is_err(), "{bad}");
        }
    }
}
