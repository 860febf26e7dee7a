//! The two halves against each other, and each against a peer that breaks the rules, over memory of every kind.

mod halves;
mod hostile;
mod malformed;
mod notifications;
mod reach;
mod world;
