//! What every store promises, asked of every store: memory, a file through the page cache and past it, and the
//! decorators around them.

extern crate headwater_store as store;

mod beds;
mod device;
mod file;
mod locks;
mod model;
mod suite;
