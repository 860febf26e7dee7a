//! Drivers against devices that are strict, and against devices that lie.

mod blk;
mod hostile;
mod start;
mod world;
