//! Drivers against devices that are strict, and against devices that lie.

mod blk;
mod hostile;
mod mmio;
mod model;
mod pci;
mod start;
mod world;
