//! The life of branches, on every server and storage.

mod damage;
mod delete;
mod demo;
mod image;
mod load;
mod lost;
mod many;
mod moving;
mod projects;
mod recut;
mod room;
mod story;
mod suspend;
pub(crate) mod unprivileged;
mod zfs;
