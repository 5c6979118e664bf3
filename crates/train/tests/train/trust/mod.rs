//! What people suffer from in other trainers, and what says so when something does go wrong.

mod folder;
mod known_failures;
mod non_finite;
mod step;
mod verify;
mod watchdog;
