//! A function from outside: a client on its socket grants memory, drives registers and takes memory back.

mod driven;
mod far;
mod grants;
mod hostile;
mod interrupts;
mod killed;
mod protocol;
mod reset;
mod served;
