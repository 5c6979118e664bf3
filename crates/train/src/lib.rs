//! Runs training steps over ranks: optimizer, metrics, recovery.
