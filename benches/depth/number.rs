//! Many clones of one parent.

use std::time::Duration;

use anyhow::Result;
use dbranch::types::VolumeId;

use crate::SOME;
use crate::family::Family;
use crate::floor::Floor;

/// Clones the root so often, and beside the first and the last by hand.
pub(crate) fn measure(family: &mut Family<'_>, floor: Floor, count: usize) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    eprintln!("{count} clones");
    let root = family.root.clone();
    let (mut ours, mut by_hand) = (Vec::new(), Vec::new());
    for i in 0..count {
        if i < SOME || i + SOME >= count {
            by_hand.push(floor_once(family, floor, &root)?);
            family.settle()?;
        }
        ours.push(family.clone_of(&root)?);
    }
    crate::compare(&format!("number: {count} clones of the root"), &ours);
    crate::compare(&format!("  beside them {}", floor.name()), &by_hand);
    Ok(())
}

/// Clones a volume by hand and removes the clone.
pub(crate) fn floor_once(family: &Family<'_>, floor: Floor, of: &VolumeId) -> Result<Duration> {
    let made = family.path(&VolumeId::random());
    family.settle()?;
    let took = floor.clone_volume(&family.path(of), &made)?;
    floor.destroy(&family.path(of), &made)?;
    Ok(took)
}
