//! A queue between a driver's ring and a device that does what a test says.

mod faults;
mod order;
mod sleep;
mod unseen;
mod world;
