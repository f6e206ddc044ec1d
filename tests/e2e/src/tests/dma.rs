// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Copies to and from the client's memory, over each road and with each kind of memory.

use anyhow::Result;
use muser_e2e::check::{equal, works};
use muser_e2e::rig::Rig;
use muser_e2e::sys::{Memory, PAGE};
use muser_e2e::vfio::{Road, DMA_BOTH};

use super::topic;

topic!("dma", dma: [client_maps_and_unmaps]);

/// What the client's side of these tests is made of, with nothing of muser's in between.
fn client_maps_and_unmaps(road: Road) -> Result<()> {
    let rig = Rig::new(road)?;
    for (kind, iova) in Memory::ALL.into_iter().zip((1u64..).map(|i| i << 24)) {
        let memory = works(&format!("making {kind}"), kind.map(4 * PAGE))?;
        let what = format!("mapping {kind}");
        works(&what, rig.client.dma_map(&memory, iova, DMA_BOTH))?;
        let length = memory.len() as u64;
        let unmapped = works("unmapping", rig.client.dma_unmap(iova, length))?;
        equal("bytes unmapped", unmapped, length)?;
        works(&what, rig.client.dma_map(&memory, iova, DMA_BOTH))?;
        let unmapped = works("unmapping all", rig.client.dma_unmap_all())?;
        equal("bytes unmapped of all", unmapped, length)?;
    }
    Ok(())
}
