//! The daemon's own life, and what is left of things it was killed in.

mod crash;
mod start;
mod swept;
