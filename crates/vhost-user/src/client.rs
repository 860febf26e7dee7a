//! A front-end: the side of a connection that has the memory and asks for the device.
