//! HMP: the monitor for people.
