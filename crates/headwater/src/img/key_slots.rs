//! The options of `img amend` that say which passphrases open an encrypted image.

use super::create::passphrase;
use graph::Objects;
use image::SlotChange;
use std::rc::Rc;
use std::time::Duration;

/// As they were given; `encrypt.` is off.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct KeyOptions {
    /// `state=`: whether the slot shall open the image.
    active: Option<bool>,
    new_secret: Option<String>,
    old_secret: Option<String>,
    slot: Option<usize>,
    deriving: Option<Duration>,
}

impl KeyOptions {
    /// Takes an option, if it is one of these. `written` is how the user wrote the key.
    pub(super) fn take(&mut self, key: &str, written: &str, value: &str) -> Result<bool, String> {
        let number = || value.parse::<u64>().map_err(|_| format!("Parameter '{written}' expects a number"));
        match key {
            "state" => {
                self.active = Some(match value {
                    "active" => true,
                    "inactive" => false,
                    _ => return Err(format!("Parameter 'state' does not accept value '{value}'")),
                });
            }
            "new-secret" => self.new_secret = Some(value.to_owned()),
            "old-secret" => self.old_secret = Some(value.to_owned()),
            "keyslot" => self.slot = Some(usize::try_from(number()?).unwrap_or(usize::MAX)),
            "iter-time" => self.deriving = Some(Duration::from_millis(number()?)),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What they ask for, in all; in QEMU's words where they do not go together.
    pub(super) fn change(self, objects: &Rc<Objects>) -> Result<Option<SlotChange>, String> {
        let Self { active, new_secret, old_secret, slot, deriving } = self;
        let Some(active) = active else {
            let nothing = new_secret.is_none() && old_secret.is_none() && slot.is_none() && deriving.is_none();
            return if nothing { Ok(None) } else { Err("Parameter 'state' is missing".to_owned()) };
        };
        if active {
            if old_secret.is_some() {
                return Err("'old-secret' must not be given when activating keyslots".to_owned());
            }
            let new = passphrase(new_secret.as_deref(), objects)?;
            let new = new.ok_or("'new-secret' is required to activate a keyslot")?;
            return Ok(Some(SlotChange::Add { slot, passphrase: new, deriving }));
        }
        if new_secret.is_some() {
            return Err("'new-secret' must not be given when erasing keyslots".to_owned());
        }
        if deriving.is_some() {
            return Err("'iter-time' must not be given when erasing keyslots".to_owned());
        }
        match (slot, passphrase(old_secret.as_deref(), objects)?) {
            (Some(slot), old) => Ok(Some(SlotChange::Erase(slot, old))),
            (None, Some(old)) => Ok(Some(SlotChange::Forget(old))),
            (None, None) => {
                Err("To erase keyslot(s), either explicit keyslot index or the password currently contained in \
                                 them must be given"
                    .to_owned())
            }
        }
    }
}
