/* The protocol of slots, arrival flags and credits that the kernels run (csrc/cuda/kernel_args.h),
 * for spin. model.py puts parameters before this text and the blocks of all ranks after it: the
 * steps of a block are those of the real schedule.
 *
 * A block is one process. Its step goes as in the kernel:
 *
 *   WAIT_ARRIVAL, WAIT_CREDIT      warp 0, one lane a peer; a flag that is satisfied stays so until
 *                                  this very block goes on, hence the order of the waits is no matter
 *   BEGIN_READ, BEGIN_WRITE  ...   all threads move the bytes: everything is being read and written
 *   END_READ, END_WRITE            at once, and slots are looked at both at the start and at the end
 *   PUBLISH_ARRIVAL, PUBLISH_CREDIT    thread 0, one store after the other
 *
 * A slot holds the value of the message that it carries, TORN while it is being written: a receiver
 * that reads too early, or whose slot is overwritten while it reads, fails an assertion. A block
 * that waits for ever is an invalid end state.
 *
 * What this cannot show: spin is sequentially consistent, so fences and scopes are not its subject.
 */

#define TORN 0

/* The tag of the operation is in the flag and (as a ghost) in the data. */
#define VALUE(message, tag) ((message) * TAGS + (tag))
#define MESSAGE_OF(value) ((value) / TAGS)
#define SLOT(channel, message) ((channel) * SLOTS + ((message) - 1) % SLOTS)

byte slot[CHANNELS * SLOTS];    /* in the receiver's staging, written by the sender */
byte arrival[CHANNELS * SLOTS]; /* in the receiver's staging, written by the sender */
byte credit[CHANNELS];          /* in the sender's staging, written by the receiver */

/* Each rank's own: messages so far, as the last operation left them. */
byte received[CHANNELS];
byte sent[CHANNELS];

bool abort_word[RANKS];
byte ended[RANKS]; /* blocks of the rank that are through */

/* The k-th message that this operation receives, or sends, over a channel. */
#define IN(channel, k) (received[channel] + (k))
#define OUT(channel, k) (sent[channel] + (k))

#define ABORTED abort_word[RANK]

/* Kernels of a rank run one after the other. A block that finds the operation aborted leaves at
 * once: what the rank's counts say is not true any more. */
#define START(blocks_before, leave)      \
  (ended[RANK] >= blocks_before);        \
  if                                     \
  :: ABORTED -> goto leave               \
  :: !ABORTED                            \
  fi;

#define WAIT_ARRIVAL(channel, k, leave)                                         \
  if                                                                            \
  :: MESSAGE_OF(arrival[SLOT(channel, IN(channel, k))]) == IN(channel, k)       \
  :: ABORTED -> goto leave                                                      \
  fi;                                                                           \
  if                                                                            \
  :: arrival[SLOT(channel, IN(channel, k))] == VALUE(IN(channel, k), TAG)       \
  :: else -> abort_word[RANK] = true; goto leave /* the ranks disagree */       \
  fi;

#define WAIT_CREDIT(channel, k, leave)                  \
  if                                                    \
  :: OUT(channel, k) - 1 - credit[channel] < SLOTS      \
  :: ABORTED -> goto leave                              \
  fi;

#define BEGIN_READ(channel, k) \
  assert(slot[SLOT(channel, IN(channel, k))] == VALUE(IN(channel, k), TAG));
#define END_READ(channel, k) \
  assert(slot[SLOT(channel, IN(channel, k))] == VALUE(IN(channel, k), TAG));
#define BEGIN_WRITE(channel, k) slot[SLOT(channel, OUT(channel, k))] = TORN;
#define END_WRITE(channel, k) \
  slot[SLOT(channel, OUT(channel, k))] = VALUE(OUT(channel, k), TAG);

#define PUBLISH_ARRIVAL(channel, k) \
  arrival[SLOT(channel, OUT(channel, k))] = VALUE(OUT(channel, k), TAG);
#define PUBLISH_CREDIT(channel, k) credit[channel] = IN(channel, k);

/* The end of a block that was not aborted. */
#define KEEP_RECEIVED(channel, k) received[channel] = IN(channel, k);
#define KEEP_SENT(channel, k) sent[channel] = OUT(channel, k);
#define LEFT ended[RANK]++;
