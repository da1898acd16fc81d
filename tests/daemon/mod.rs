//! The daemon's own life, and what is left of things it was killed in.

mod api;
mod crash;
mod start;
mod swept;
