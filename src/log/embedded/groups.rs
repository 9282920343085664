//! Which member of a consumer group reads which partition, within this process (the only one that may write
//! offsets, CORRECTNESS 12).
//!
//! The invariant: a partition has one owner at a time. One that is to move is first shown to its owner as
//! revoked; the owner gives it up by polling again (or by leaving), and only then may the next one claim it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::catalog::Catalog;
use crate::event::TopicPartition;

pub(super) type MemberId = u64;

#[derive(Default)]
pub(super) struct Groups {
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    last_member: MemberId,
    groups: HashMap<String, Group>,
}

#[derive(Default)]
struct Group {
    /// Topics each member wants.
    members: BTreeMap<MemberId, Vec<String>>,
    partitions: BTreeMap<TopicPartition, Assignment>,
}

#[derive(Default)]
struct Assignment {
    owner: Option<MemberId>,
    /// Who is to own it.
    target: Option<MemberId>,
    /// The owner has been shown that it loses it.
    told: bool,
}

impl Groups {
    pub fn join(&self, group: &str, topics: &[String], catalog: &Catalog) -> MemberId {
        let mut inside = self.lock();
        inside.last_member += 1;
        let member = inside.last_member;
        let group = inside.groups.entry(group.to_owned()).or_default();
        group.members.insert(member, topics.to_vec());
        group.assign(catalog);
        member
    }

    pub fn leave(&self, name: &str, member: MemberId, catalog: &Catalog) {
        let mut inside = self.lock();
        if let Some(group) = inside.groups.get_mut(name) {
            group.members.remove(&member);
            for assignment in group.partitions.values_mut().filter(|a| a.owner == Some(member)) {
                assignment.owner = None;
                assignment.told = false;
            }
            if group.members.is_empty() {
                inside.groups.remove(name);
            } else {
                group.assign(catalog);
            }
        }
    }

    /// Shares out partitions of topics that are new.
    pub fn topics_changed(&self, catalog: &Catalog) {
        for group in self.lock().groups.values_mut() {
            group.assign(catalog);
        }
    }

    /// What the group's members read, all together.
    pub fn topics(&self, group: &str) -> Vec<String> {
        self.lock().groups.get(group).map_or_else(Vec::new, |g| g.members.values().flatten().cloned().collect())
    }

    pub fn has_members(&self, group: &str) -> bool {
        self.lock().groups.contains_key(group)
    }

    /// First thing in a poll: gives up what was shown as revoked by the last one, and says what is revoked now.
    pub fn revoked(&self, group: &str, member: MemberId) -> Revocation {
        let mut result = Revocation::default();
        if let Some(group) = self.lock().groups.get_mut(group) {
            for (partition, assignment) in &mut group.partitions {
                if assignment.owner != Some(member) || assignment.target == Some(member) {
                    continue;
                }
                if assignment.told {
                    assignment.owner = None;
                    assignment.told = false;
                    result.released = true;
                } else {
                    assignment.told = true;
                    result.partitions.push(partition.clone());
                }
            }
        }
        result
    }

    /// What `member` may claim now.
    pub fn claimable(&self, group: &str, member: MemberId) -> Vec<TopicPartition> {
        let inside = self.lock();
        let Some(group) = inside.groups.get(group) else { return Vec::new() };
        let free = group.partitions.iter().filter(|(_, a)| a.owner.is_none() && a.target == Some(member));
        free.map(|(partition, _)| partition.clone()).collect()
    }

    /// Takes the partition, if it is still there to be taken.
    pub fn claim(&self, group: &str, member: MemberId, partition: &TopicPartition) -> bool {
        let mut inside = self.lock();
        match inside.groups.get_mut(group).and_then(|group| group.partitions.get_mut(partition)) {
            Some(assignment) if assignment.owner.is_none() && assignment.target == Some(member) => {
                assignment.owner = Some(member);
                assignment.told = false;
                true
            }
            _ => false,
        }
    }

    pub fn owns(&self, group: &str, member: MemberId, partition: &TopicPartition) -> bool {
        let inside = self.lock();
        let assignment = inside.groups.get(group).and_then(|group| group.partitions.get(partition));
        assignment.is_some_and(|a| a.owner == Some(member))
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
pub(super) struct Revocation {
    pub partitions: Vec<TopicPartition>,
    /// Something was given up: others may claim it.
    pub released: bool,
}

impl Group {
    /// Partitions go round the members that want their topic.
    fn assign(&mut self, catalog: &Catalog) {
        let mut topics: Vec<&String> = self.members.values().flatten().collect();
        topics.sort();
        topics.dedup();
        let mut turn = 0;
        let mut targets = BTreeMap::new();
        for name in topics {
            let Some(topic) = catalog.get(name) else { continue };
            let wanting: Vec<MemberId> =
                self.members.iter().filter(|(_, topics)| topics.contains(name)).map(|(id, _)| *id).collect();
            for partition in 0..topic.partitions() {
                targets.insert(TopicPartition::new(topic.name.clone(), partition), wanting[turn % wanting.len()]);
                turn += 1;
            }
        }
        for (partition, assignment) in &mut self.partitions {
            assignment.target = targets.remove(partition);
            if assignment.target == assignment.owner {
                assignment.told = false;
            }
        }
        for (partition, target) in targets {
            self.partitions.insert(partition, Assignment { owner: None, target: Some(target), told: false });
        }
        self.partitions.retain(|_, a| a.owner.is_some() || a.target.is_some());
    }
}
