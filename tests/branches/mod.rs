//! The life of branches, on every server and storage.

mod damage;
mod delete;
mod demo;
mod load;
mod lost;
mod many;
mod moving;
mod projects;
mod room;
mod story;
mod suspend;
mod unprivileged;
mod zfs;
