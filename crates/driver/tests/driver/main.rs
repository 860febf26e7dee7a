//! Drivers against devices that are strict, and against devices that lie.

mod blk;
mod chaos;
mod devices;
mod hostile;
mod mmio;
mod model;
mod pci;
mod peer;
mod queues;
mod start;
mod tasks;
mod viommu;
mod world;
